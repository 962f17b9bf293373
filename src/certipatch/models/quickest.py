"""The fastest backend of a network on this CPU: torch as it is, its weights with channels last, or onnxruntime.

Measured on two cores, milliseconds an image: EfficientNet-Lite0 115 as it is, 69 with channels last, 47 compiled by torch,
20 by onnxruntime, which joins batch norms and activations with their convolutions; the conv network of 32x32 images 4.1, 2.5,
2.4, 2.2. Compiling takes longer than exporting and is done anew for each batch size, so it is not tried.
"""

import copy
import io
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certipatch.inference import one_thread
from certipatch.models.adapters.onnx import OnnxNetwork
from certipatch.models.cascade import Cascade
from certipatch.models.fallback_ensemble import FallbackEnsemble

MIN_WORKLOAD_SECONDS = 30.0  # seconds of work that make an export, which takes 2 to 10, worth its time
LOGIT_RTOL = 1e-3  # largest change of a logit, relative to 1 + the largest, that counts as the same network
EAGER = "torch"
Run = Callable[[Tensor], Tensor]


def fastest_backend(
    network: nn.Module, pictures: Float[Tensor, "N C H W"], number: int, only: str | None = None
) -> tuple[str, nn.Module | None]:
    """Measure on ``pictures`` which backend runs ``network`` fastest; return its name and its module, None for PyTorch.

    The module gives the same logits up to rounding, and passes no gradients. ``network`` is not changed. Nothing is
    measured if ``number`` images take less than half a minute, or if the device is not the CPU. If ``only`` names a
    backend, it is used without measuring; PyTorch replaces it if it is unavailable. All networks of a cascade run by
    the backend that is best for the first one.
    """
    if isinstance(network, FallbackEnsemble):  # the first is asked almost always
        return fastest_backend(network.parts[0], pictures, number, only)
    if isinstance(network, Cascade):
        first, *others = network.parts
        name, fast_forward = fastest_backend(first, pictures, number, only)
        if fast_forward is None:
            return name, None
        return name, network.with_parts(
            [fast_forward, *(fastest_backend(part, pictures, number, name)[1] or part for part in others)]
        )
    no_choice = pictures.device.type != "cpu" or isinstance(network, OnnxNetwork)
    if only == EAGER or no_choice or not any(True for _ in network.parameters()):
        return EAGER, None
    with torch.inference_mode():
        one = pictures[:1]
        random = torch.rand(one.shape, generator=torch.Generator().manual_seed(0)).to(one)
        probes = torch.cat([one, one.flip(3), random, torch.zeros_like(one), torch.ones_like(one)])
        expected, seconds = network(probes), _seconds(network, pictures)
        if only is None and seconds / len(pictures) * number < MIN_WORKLOAD_SECONDS:
            return EAGER, None
        name, network_run = EAGER, None
        for way, make in (("channels last", _channels_last), ("onnxruntime", _onnxruntime)):
            if only not in (None, way) or (run := make(network, pictures)) is None or not _same(run(probes), expected):
                continue
            taken = _seconds(run, pictures)
            if only == way or taken < 0.95 * seconds:
                name, network_run, seconds = way, run, taken
    return name, network_run


def _seconds(run: Run, pictures: Tensor) -> float:
    """Measure the seconds of a pass as it is served: by one thread, while others compute other passes."""
    best = float("inf")
    with one_thread() as threads:
        for _ in range(2):
            started = time.perf_counter()
            run(pictures)
            best = min(best, time.perf_counter() - started)
    return best / threads


def _same(computed: Tensor, expected: Tensor) -> bool:
    return bool((computed - expected).abs().max() <= LOGIT_RTOL * (1 + expected.abs().max()))


def _channels_last(network: nn.Module, pictures: Tensor) -> nn.Module:
    with torch.inference_mode(False):
        copied = copy.deepcopy(network).requires_grad_(False)
        return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _onnxruntime(network: nn.Module, pictures: Tensor) -> nn.Module | None:
    """None if a package is missing, or the network has operations that ONNX cannot hold."""
    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4  # passes run side by side
    written = io.BytesIO()
    try:
        as_program(network, pictures[:2].flip(2, 3) / 2, ["logits"]).save(
            written
        )  # others than answers are compared on
        session = onnxruntime.InferenceSession(written.getvalue(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever another package finds wrong: torch runs the network then
        logging.getLogger(__name__).info("onnxruntime does not run this network: %s", error)
        return None
    return OnnxNetwork(session).eval()


def as_program(module: nn.Module, images: Float[Tensor, "B C H W"], names: Sequence[str]) -> Any:
    """A module as an ONNX program for any number of images, with outputs of these names; for ``images`` of two or more.

    Errors: ``torch.onnx.OnnxExporterError`` where it has operations that ONNX cannot hold.
    """
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # of packages about their own parts; what matters is checked afterwards
            return torch.onnx.export(
                module,
                (images.clone(),),
                dynamo=True,
                input_names=["images"],
                output_names=list(names),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
