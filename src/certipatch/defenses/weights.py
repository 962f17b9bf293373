"""A network's weights on disk, as safetensors: they cannot run code, and nothing is half written."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_weights(folder: Path, network: nn.Module, dtype: torch.dtype) -> str:
    """Write ``weights.safetensors`` with floating-point weights as ``dtype``; gives its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: w.to(dtype) if w.is_floating_point() else w for n, w in network.state_dict().items()}
    write_tensors(folder / "weights.safetensors", state)
    return sha256(folder / "weights.safetensors")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. OSError where there is no room or permission."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
