"""Certify an ONNX file, here one written on the spot. Needs: pip install onnx onnxruntime

python examples/any_onnx.py

From the command line:
certipatch evaluate --model onnx:net.onnx --defense patchcleanser --data cifar10 --patch 5 --limit 100 --out runs/net
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

import certipatch as cp
from certipatch.models.adapters import open_model


def write_network(path: Path) -> None:
    """A linear classifier of 3x32x32 pictures, five classes."""
    weights = np.random.default_rng(0).normal(size=(3 * 32 * 32, 5)).astype(np.float32) / 10
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 32, 32])
    answer = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 5])
    graph = helper.make_graph(nodes, "linear", [given], [answer], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def main() -> None:
    threat = cp.PatchThreat(2)
    with tempfile.TemporaryDirectory() as folder:
        write_network(Path(folder) / "net.onnx")
        defense = cp.PatchCleanser(open_model(f"onnx:{folder}/net.onnx"), threat, masks=3)
        certificate = defense.certify(torch.rand(8, 3, 32, 32), threat)
    print("certified", certificate.certified.tolist())


if __name__ == "__main__":
    main()
