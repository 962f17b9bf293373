"""Checkpoints: network and optimizer in one safetensors file, written whole or not at all.

Data order, augmentation and drawn views are functions of (seed, step), so that these tensors and the step are all that
a training needs to go on exactly as if it had never stopped.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from certipatch.defenses.card import write_tensors
from certipatch.errors import InputError


def save(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, recipe: str) -> None:
    """Write a checkpoint; ``recipe`` is the hash of the recipe and data that it belongs to."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{number}.{slot}": torch.as_tensor(value) for slot, value in slots.items() if value is not None
        }
    write_tensors(path, tensors, {"training": json.dumps({"step": step, "recipe": recipe})})


def load(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: str) -> int:
    """Put a checkpoint into ``network`` and ``optimizer``; gives the step after which it was written, 0 without a file.

    Errors: InputError where the file is unreadable or belongs to another recipe.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("training", "{}"))
            if state.get("recipe") != recipe:
                raise InputError(f"{path} belongs to another recipe or other data; give a new --out or remove it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network.load_state_dict({n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"cannot go on from {path}: {' '.join(str(error).split())}; remove it to start again"
        ) from None
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, slot = name.split(".", 2)
            slots.setdefault(int(number), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(state["step"])
