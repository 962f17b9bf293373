"""Devices: networks run on the default one unless the caller names another."""

import atexit
import ctypes
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from certipatch.errors import InputError
from certipatch.plumbing import distributed

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def default() -> torch.device:
    """The accelerator that torch sees, if it knows float64, which margins need; else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator


@contextmanager
def no_tf32() -> Iterator[None]:
    """Run float32 convolutions in float32. On an accelerator torch would round them to 10 bits (TF32). Outputs would then
    depend on the number of images in a pass by more than a certificate's tolerance."""
    rounded, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = rounded


def keep_freed_memory() -> None:
    """Let this process keep freed memory: each step of a training needs the same memory again.

    glibc would give large pieces back to the system and take them anew, zeroed page by page: a bf16 step of the conv
    network took 0.92 s so and 0.77 s without (two cores). Elsewhere this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
            mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX of malloc.h


def fabric(precision: Any = "32-true") -> "Fabric":
    """Fabric, launched: one process on one device, or under torchrun one device for each of its processes.

    Errors: InputError if torchrun started more processes on this host than it has accelerators, or other numbers
    on other hosts.
    """
    from lightning.fabric import Fabric

    for name in ("lightning.fabric", "lightning.pytorch"):  # silences the message of every process that joins
        logging.getLogger(name).setLevel(logging.WARNING)
    kind, total = default().type, distributed.count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if total > 1 else 1
    there = torch.accelerator.device_count() if kind != "cpu" else here
    if here > there:
        raise InputError(
            f"torchrun started {here} processes on a host with {there} x {kind}; use --nproc-per-node {there}"
        )
    if total % here:
        raise InputError(f"{total} processes are not {here} on each host; give the same --nproc-per-node everywhere")
    if total > 1:
        _meet(kind)
    launched = Fabric(accelerator=kind, devices=here, num_nodes=total // here, precision=precision)
    launched.launch()
    return launched


def _meet(kind: str) -> None:
    """Join the process group under keys of this attempt; Fabric itself does not.

    torchrun's store outlives a restart and keeps the addresses of processes that are gone; a connection to one of them
    fails ("connection refused", torch 2.13).
    """
    group = torch.distributed
    if not group.is_initialized():
        backend, store = group.get_default_backend_for_device(kind), distributed.shared_store("group")
        group.init_process_group(backend, store=store, rank=distributed.rank(), world_size=distributed.count())
        atexit.register(lambda: group.destroy_process_group() if group.is_initialized() else None)


def worker() -> tuple[torch.device, distributed.Workers]:
    """The device of this process, and its place among the workers: the default device, or torchrun's choice."""
    if distributed.count() == 1:
        return default(), distributed.Workers()
    own_fabric = fabric()
    return own_fabric.device, distributed.join(own_fabric.broadcast(secrets.token_hex(8)))


def training_layout(network: nn.Module) -> torch.memory_format:
    """The fastest memory layout in which a network can be trained: channels last, but for one kind of layer.

    oneDNN's AVX2 kernel of the gradient of a strided 1x1 convolution in that layout writes past its buffer if fewer
    than 8 channels come in (seen with torch 2.13: some hundred backward passes end in "double free or corruption").
    """
    for layer in network.modules():
        if (
            isinstance(layer, nn.Conv2d)
            and layer.in_channels < 8
            and set(layer.kernel_size) == {1} != set(layer.stride)
        ):
            return torch.contiguous_format
    return torch.channels_last
