"""Passes of a fixed number of rows, for networks that ask a part of themselves about some of their rows only."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def run_in_passes(
    run: Callable[[Int64[Tensor, " rows"]], Float[Tensor, "rows K"]], chosen: Int64[Tensor, " n"], rows: int
) -> Float[Tensor, "n K"]:
    """Answers to the ``chosen`` rows, n ≥ 1, so many at a time; the last pass repeats its last row.

    A row's bits do not then depend on how many others are chosen. Where gradients are asked for, one pass takes all.
    """
    if torch.is_grad_enabled():
        return run(chosen)
    filled = torch.cat([chosen, chosen[-1:].expand(-len(chosen) % rows)])
    return torch.cat([run(some) for some in filled.split(rows)])[: len(chosen)]
