"""A step of certified training through all places, against plain autograd through all of them: MLP(255), MNIST's size.

The baseline bounds every place with autograd, in batches of places, and gives the same gradient (compared here to 1e-4
in float32; ``tests/test_ibp_training.py`` compares to 1e-7 in float64). Times are CPU time, so that a busy machine counts less.
"""

import time

import pytest
import torch

from certipatch.bounds.propagate import layout, rivals_of
from certipatch.bounds.worst import block_bounds, places
from certipatch.models import MLP
from certipatch.threats import PatchThreat
from certipatch.training.interval import bound_loss, worst_margins

ASKED = 4
BATCH, TOGETHER = 32, 24
TIMES: dict[int, float] = {}
GRADIENTS: dict[int, list[torch.Tensor]] = {}


def setting(side: int):
    """A network, pictures with labels, and all places."""
    torch.manual_seed(0)
    model = MLP(1, 10, (28, 28))
    return model, torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,)), places(PatchThreat(side), (28, 28))


def plain(model, images, label, where) -> list[torch.Tensor]:
    """The gradient of the loss with every place in the graph."""
    passed, picture, parts = layout(model, (1, 28, 28)).passage(), torch.arange(BATCH), []
    for some in torch.arange(len(where)).split(TOGETHER):
        pairs = picture.repeat_interleave(len(some)), some.repeat(BATCH)
        last = block_bounds(passed, images, where, *pairs).map(lambda x: x.unflatten(0, (BATCH, -1)))
        parts.append(passed.margins(last, label, rivals_of(label, 10)))
    return list(torch.autograd.grad(bound_loss(torch.cat(parts, 1).amin(1)), list(model.parameters())))


def ours(model, images, label, where) -> list[torch.Tensor]:
    """The same through the worst places, as in training."""
    margins = worst_margins(layout(model, (1, 28, 28)), images, label, where, 1.0)
    return list(torch.autograd.grad(bound_loss(margins), list(model.parameters())))


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("side", [2, 5])
def test_plain_autograd(benchmark, side: int) -> None:
    benchmark.group = f"{side}x{side}"
    given = setting(side)
    GRADIENTS[side] = benchmark.pedantic(lambda: plain(*given), rounds=2, warmup_rounds=1)
    TIMES[side] = benchmark.stats.stats.min


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("side", [2, 5])
def test_worst_places(benchmark, side: int) -> None:
    benchmark.group = f"{side}x{side}"
    given = setting(side)
    found = benchmark.pedantic(lambda: ours(*given), rounds=5, warmup_rounds=1)
    if side in TIMES:
        torch.testing.assert_close(found, GRADIENTS[side], atol=1e-4, rtol=1e-3)
        times = TIMES[side] / benchmark.stats.stats.min
        benchmark.extra_info["times_faster"] = times
        print(f"\n{side}x{side}: {times:.1f} times faster, asked for {ASKED}")
