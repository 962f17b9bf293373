"""A network's weights on disk, as safetensors: they cannot run code, and no file is half written."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

SCALE = ":scale"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_weights(folder: Path, network: nn.Module, stored: str) -> str:
    """Write ``weights.safetensors`` with floating-point weights as ``stored``; gives its sha256.

    Args:
        stored: ``float32``, ``float16``, or ``int8``. With int8, a weight of several axes is stored as whole numbers from −127
            to 127, and its factor per output as NAME:scale; vectors stay float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in network.state_dict().items():
        if not weight.is_floating_point():
            tensors[name] = weight
        elif stored != "int8":
            tensors[name] = weight.to(getattr(torch, stored))
        elif weight.dim() < 2:
            tensors[name] = weight.float()
        else:
            scale = weight.float().abs().flatten(1).amax(1).clamp(min=1e-30) / 127
            tensors[name] = (weight / _along(scale, weight)).round().to(torch.int8)
            tensors[name + SCALE] = scale
    write_tensors(folder / "weights.safetensors", tensors)
    return sha256(folder / "weights.safetensors")


def restored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that ``save_weights`` wrote, floating-point ones in float32."""
    weights = {n: w.float() if w.is_floating_point() else w for n, w in tensors.items() if not n.endswith(SCALE)}
    for name, scale in tensors.items():
        if name.endswith(SCALE):
            whole = weights[name.removesuffix(SCALE)].float()
            weights[name.removesuffix(SCALE)] = whole * _along(scale.float(), whole)
    return weights


def _along(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (weight.dim() - 1))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. OSError if there is no room or permission."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
