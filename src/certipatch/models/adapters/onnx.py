"""ONNX files: a black box that onnxruntime runs on the CPU."""

import hashlib
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from certipatch.errors import InputError, validated
from certipatch.models.adapters.adapted import Adapted, Preprocessing
from certipatch.models.adapters.onnx_files import outside
from certipatch.models.adapters.sources import needed, opening

MAX_FILE = 2 * 2**30  # bytes; onnxruntime reads no larger file without external data
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@final
class OnnxNetwork(nn.Module):
    """An onnxruntime session: inputs (N, C, H, W) to its first output. Gradients do not pass."""

    def __init__(self, session: Any):
        super().__init__()
        self.session = session
        (given,) = session.get_inputs()
        self.input, self.real = given.name, _TYPES[given.type]
        self.dtype = getattr(torch, self.real.__name__)
        """In which it computes."""
        self.batch = given.shape[0] if isinstance(given.shape[0], int) else None

    def forward(self, pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        array = pictures.detach().cpu().to(self.dtype).numpy()
        if self.batch is None:
            parts = [self._run(array)]
        else:  # a file of fixed batch size: the last batch is filled up, and cut again
            padded = np.concatenate([array, np.repeat(array[-1:], -len(array) % self.batch, axis=0)])
            parts = [self._run(padded[i : i + self.batch]) for i in range(0, len(padded), self.batch)]
        outputs = np.concatenate(parts)[: len(array)]
        return torch.from_numpy(outputs).to(pictures.device, torch.promote_types(torch.float32, pictures.dtype))

    def _run(self, array: np.ndarray) -> np.ndarray:
        with opening("the ONNX model's run"):
            return self.session.run(None, {self.input: array})[0]


def from_onnx(file: str) -> Adapted:
    """``onnx:FILE``; what is to be done to images before says FILE with the ending .json, if it is there.

    Errors: InputError for a file that onnxruntime does not read, or that is no classifier of one input (N, C, H, W).
    """
    what, path = f"onnx:{file}", Path(file)
    onnxruntime = needed("onnxruntime", what, "onnxruntime")
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{what} is larger than 2 GiB")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror or error}") from None
    with opening(what):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        beside = _digests(_outside(content, what), path.parent, what)
        source = str(path) if beside else content
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _TYPES or len(inputs[0].shape) != 4:
        shapes = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise InputError(f"{what} reads {shapes}; a classifier of float pictures (N, C, H, W) is needed")
    channels, height, width = inputs[0].shape[1:]
    described: dict[str, Any] = {"channels": channels} if isinstance(channels, int) else {}
    if isinstance(height, int) and isinstance(width, int):
        described["size"] = (height, width)
    preprocessing = _preprocessing(path.with_suffix(".json"), described)
    identity = hashlib.sha256(content + preprocessing.model_dump_json().encode())
    for digest in beside:
        identity.update(digest)
    return Adapted(OnnxNetwork(session).eval(), preprocessing, f"onnx:{path.name}", identity.hexdigest())


def _outside(content: bytes, what: str) -> list[str]:
    try:
        return outside(content)
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None


def _digests(names: list[str], folder: Path, what: str) -> list[bytes]:
    """SHA-256 of the files beside a model that hold weights of it. InputError if one lies elsewhere."""
    digests = []
    for name in names:
        if Path(name).name != name or (folder / name).is_symlink():
            raise InputError(f"{what} has weights in {name!r}, which is no file beside it")
        try:
            with (folder / name).open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{what} has weights in {name!r}, which cannot be read: {error.strerror}") from None
    return digests


def _preprocessing(path: Path, described: dict[str, Any]) -> Preprocessing:
    context = str(path) if path.exists() else "the ONNX file"
    try:
        with validated(context, Preprocessing.model_fields, "the file"):
            if not path.exists():
                return Preprocessing.model_validate(described)
            if path.stat().st_size > 16 * 2**20:
                raise InputError(f"{path} is larger than 16 MiB; that is no preprocessing")
            given = Preprocessing.model_validate_json(path.read_bytes()).model_dump(exclude_unset=True)
            return Preprocessing.model_validate(described | given)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
