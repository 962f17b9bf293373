"""Checkpoints: network and optimizer in one safetensors file, written whole or not at all, with a digest of both.

Data order, augmentation and drawn views are functions of (seed, step), so that these tensors and the step are all that
a training needs to go on exactly as if it had never stopped.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from certipatch.errors import InputError
from certipatch.plumbing.parsing import from_json
from certipatch.saved.weights import write_tensors


def save(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    recipe: str,
    memory: torch.Tensor | None = None,
) -> None:
    """Write a checkpoint; ``recipe`` is the hash of the recipe and data that it belongs to."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {} if memory is None else {"memory": memory}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{number}.{slot}": torch.as_tensor(value) for slot, value in slots.items() if value is not None
        }
    state = json.dumps({"step": step, "recipe": recipe})
    write_tensors(path, tensors, {"training": state, "digest": _digest(tensors, state)})


def load(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: str,
    memory: torch.Tensor | None = None,
) -> int:
    """Put a checkpoint into ``network``, ``optimizer`` and ``memory``, a tensor of what the training remembers besides;
    gives the step after which it was written, 0 without a file.

    Errors: InputError where the file is unreadable or belongs to another recipe.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state = from_json(about.get("training", "{}"))
            if state.get("recipe") != recipe:
                raise InputError(f"{path} belongs to another recipe or other data; give a new --out or remove it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "digest" in about and about["digest"] != _digest(tensors, about["training"]):
            raise OSError("it was damaged after it was written")
        if memory is not None:
            memory.copy_(tensors["memory"])
        network.load_state_dict({n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")})
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, slot = name.split(".", 2)
                slots.setdefault(int(number), {})[slot] = tensor
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(state["step"])
    except InputError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot go on from {path}: {reason}; remove it to start again") from None


def _digest(tensors: dict[str, torch.Tensor], state: str) -> str:
    total = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
