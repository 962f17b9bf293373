"""Canonical inference: a row's answer has the same bits whatever stands beside it.

Rounding of a network's layers depends on how many rows a pass has and on how many threads share it. Every pass of a
network therefore has one number of rows: the last one is filled up and cut again. On the CPU each pass is computed by
one thread, and passes run side by side. The number of rows is the largest at which a row's bits depend neither on its
position in the pass nor on the other rows, and 1 if no larger one will do.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from certipatch.errors import InputError
from certipatch.plumbing.devices import no_tf32

# Pixels of one pass. On the CPU 8 rows of 32x32, which a core computes almost as fast as 32 (7.4 and 7.6 ms a row), and one
# of 224x224, faster than 8 (28 and 55 ms); on an accelerator 1024 of 32x32.
CPU_PIXELS, ACCELERATOR_PIXELS = 2**13, 2**20
PIXELS = 2**20  # of a batch, unless a batch size is given
MOST_ROWS = 32  # of a pass on the CPU
ROWS_FOR_ALL_VIEWS = 4  # a row of a network that answers for all views itself is as much work as several others
Inputs = Callable[[Int64[Tensor, " n"]], Tensor]
_rows: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]]" = weakref.WeakKeyDictionary()


def call_network(network: nn.Module, inputs: Float[Tensor, "N ..."]) -> Tensor:
    """The network's answer, one tensor. InputError if it cannot read inputs of this type or size."""
    try:
        answer = network(inputs)
    except (torch.OutOfMemoryError, InputError):
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), inputs.dtype)
        reason = " ".join(str(error).split())[:160]
        if dtype != inputs.dtype:
            reason = f"its weights are {dtype}, so convert them with images.to({dtype})"
        size = "x".join(map(str, inputs.shape[1:]))
        raise InputError(f"the model cannot read pictures of {size} in {inputs.dtype}: {reason}") from error
    if not isinstance(answer, Tensor):
        raise InputError(f"the model answers with a {type(answer).__name__}; let it give the logits alone, one tensor")
    return answer


def batch_size_for(pixels: int, given: int | None = None) -> int:
    """The number of rows in a batch: ``given``, or as many rows of ``pixels`` pixels as ``PIXELS`` allows, at least 1."""
    return given or max(1, PIXELS // pixels)


@torch.inference_mode()
@no_tf32()
def canonical_logits(
    network: nn.Module, number: int, inputs: Inputs, batch_size: int | None = None
) -> Float[Tensor, "number ..."]:
    """The network's answers to rows 0, …, number − 1, of which ``inputs`` renders those of given numbers.

    Args:
        network: in eval mode; maps (N, …) to (N, …).
        number: how many rows, at least 1.
        inputs: maps row numbers (n,) to the rows (n, …), the same bits for a row whatever the others are.
        batch_size: the most rows of a pass on an accelerator; on the CPU passes are small anyway.

    Errors: InputError if the network cannot read the rows, or does not give one answer for each.
    """
    first = inputs(torch.zeros(1, dtype=torch.int64))
    rows = rows_per_pass(network, first, batch_size)
    index = torch.arange(-(-number // rows) * rows).clamp(max=number - 1)  # the last pass repeats its last row

    def compute(chosen: Int64[Tensor, " rows"]) -> Tensor:
        return _answers(network, inputs(chosen))

    passes = index.split(rows)
    if first.device.type != "cpu":
        answers = [compute(chosen) for chosen in passes]
    elif is_in_torch_dispatch_mode():  # a counter of multiply-adds: it counts the rows alone, in this thread
        answers = [compute(chosen) for chosen in torch.arange(number).split(rows)]
    else:
        with one_thread() as threads:
            if threads > 1 and len(passes) > 1 and is_stateless(network) and not torch.is_autocast_enabled("cpu"):
                with ThreadPoolExecutor(min(threads, len(passes)), initializer=_start_worker) as pool:
                    answers = list(pool.map(torch.inference_mode()(compute), passes))
            else:
                answers = [compute(chosen) for chosen in passes]
    return torch.cat(answers)[:number]


def rows_per_pass(network: nn.Module, row: Float[Tensor, "1 ..."], batch_size: int | None = None) -> int:
    """Rows of every pass of ``network`` over rows like ``row``; found once for a network, kind of row and device.

    A row of random pixels is compared, bit by bit, first and last in a pass, among random, black and white ones.
    """
    all_views = getattr(network, "encoding", None) == "all-views"
    pixels = row[0, 0].numel() * (ROWS_FOR_ALL_VIEWS if all_views else 1)
    if row.device.type != "cpu":
        return min(batch_size or ACCELERATOR_PIXELS, max(1, ACCELERATOR_PIXELS // pixels))
    weights = next((p.dtype for p in network.parameters()), None)
    key = (tuple(row.shape), row.dtype, weights, getattr(network, "backend", None))
    known = _rows.setdefault(network, {})
    if key not in known:
        rows = min(MOST_ROWS, max(1, CPU_PIXELS // pixels))
        rows = 2 ** (rows.bit_length() - 1)
        with one_thread():
            known[key] = rows if rows == 1 or is_position_free(network, row, rows) else 1
    return known[key]


@torch.inference_mode()
def is_position_free(network: nn.Module, row: Float[Tensor, "1 ..."], rows: int) -> bool:
    """Test if answers to random rows keep their bits in another order, and beside black and white rows."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand((rows, *row.shape[1:]), generator=generator).to(row)
    beside = torch.cat([torch.zeros_like(random[: rows // 2]), torch.ones_like(random[rows // 2 :])])
    plain = _answers(network, random.clone())
    order = torch.randperm(rows, generator=generator)
    for position in {0, rows // 3, rows - 1}:
        mixed = beside.clone()
        mixed[position] = random[0]
        if not torch.equal(_answers(network, mixed)[position], plain[0]):
            return False
    return all(torch.equal(_answers(network, random[o]), plain[o]) for o in (order, torch.arange(rows).flip(0)))


def is_stateless(network: nn.Module) -> bool:
    """Test if passes of a network may run side by side: torch's and our own layers alone, without hooks."""
    return all(
        type(module).__module__.startswith(("torch.nn.", "certipatch."))
        and not (module._forward_hooks or module._forward_pre_hooks)
        for module in network.modules()
    )


@contextmanager
def one_thread() -> Iterator[int]:
    """Within it an operation is computed by one thread; gives the number of threads there were."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield threads
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _start_worker() -> None:
    torch.set_num_threads(1)


def _answers(network: nn.Module, rows: Float[Tensor, "n ..."]) -> Tensor:
    answer = call_network(network, rows)
    if answer.ndim < 2 or len(answer) != len(rows):
        raise InputError(f"the model gives {tuple(answer.shape)} where {len(rows)} answers are needed")
    return answer
