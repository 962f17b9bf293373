"""Interval bounds of all 784 places of a 5x5 patch on CIFAR-sized pictures: cones against whole passes, in float64.

The baseline passes every place through the whole network, in batches, by the same layers. It is run on few pictures,
or few places of them; compare the times per picture and place, ``per_place_us``, of one run. The margins are equal to
1e-9, and the test that runs last in each group stores ``times_faster``. Times are CPU time, so that a busy machine counts less.
"""

import time

import pytest
import torch

from certipatch.bounds import attacked, passage, patch_margins, regions, rivals_of
from certipatch.models import CNN
from certipatch.threats import PatchThreat

# depth, pictures through cones, every how many places, places of the baseline for one picture; the ratio asked for
CASES = {"4-layer CNN": (4, 256, 1, 784, 5), "5-layer wide CNN": (5, 64, 8, 28, 10)}
BATCH = 28
TIMES: dict[str, float] = {}


def setting(depth: int, pictures: int):
    """A network, pictures with labels, and all places."""
    torch.manual_seed(0)
    model = CNN(3, 10, (32, 32), depth).eval().requires_grad_(False).double()
    images = torch.rand(pictures, 3, 32, 32, dtype=torch.float64)
    return model, images, model(images).argmax(1), regions(PatchThreat(5), (32, 32))


def whole_passes(model, images, label, found, places):
    """Margins (1, places, R) of the first picture by whole passes."""
    passed, rivals, parts = passage(model, (3, 32, 32)), rivals_of(label[:1], 10), []
    for some in places.split(BATCH):
        last = passed.values(attacked(images[:1], found, some[None]))[passed.before_head]
        parts.append(passed.margins(last.map(lambda x: x[None]), label[:1], rivals))
    return torch.cat(parts, 1)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", CASES)
def test_whole_passes(benchmark, name: str) -> None:
    depth, _, _, number, _ = CASES[name]
    benchmark.group = name
    model, images, label, found = setting(depth, 1)
    places = torch.linspace(0, len(found) - 1, number).round().long()
    benchmark.pedantic(lambda: whole_passes(model, images, label, found, places), rounds=2, warmup_rounds=1)
    TIMES[name] = benchmark.stats.stats.min / number
    benchmark.extra_info["per_place_us"] = 1e6 * TIMES[name]


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", CASES)
def test_cones(benchmark, name: str) -> None:
    depth, pictures, every, number, _ = CASES[name]
    benchmark.group = name
    model, images, label, found = setting(depth, pictures)
    index = torch.arange(0, len(found), every)
    margin = benchmark.pedantic(lambda: patch_margins(model, images, label, found, index=index.tolist()), rounds=1)
    some = torch.linspace(0, len(index) - 1, min(number, 100)).round().long()
    expected = whole_passes(model, images, label, found, index[some])
    assert (margin[:1, some] - expected).abs().max() < 1e-9
    own = benchmark.stats.stats.min / pictures / len(index)
    benchmark.extra_info["per_place_us"] = 1e6 * own
    if name in TIMES:
        benchmark.extra_info["times_faster"] = TIMES[name] / own
        print(f"\n{name}: {TIMES[name] / own:.1f} times faster, asked for {CASES[name][4]}")
