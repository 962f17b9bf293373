"""A step of training under masks: random ones, climbing ones, and greedy ones; CIFAR-10's size.

Climbing masks are to cost what random ones do; greedy ones look at 98 pictures more. Times are CPU time, so that
a busy machine counts less.
"""

import time

import pytest
import torch

from certipatch.models import ConvNet
from certipatch.threats import PatchThreat
from certipatch.training.augment import draw_changes
from certipatch.training.mask_search import MaskHierarchy, MaskMemory
from certipatch.training.masking import MaskLoss
from certipatch.training.recipe import Augment, MaskTraining
from certipatch.views import mask_set

BATCH, SIZE = 64, (32, 32)
ASKED = {
    "random": MaskTraining(),
    "climbing": MaskTraining(strategy="hill-climbing"),
    "greedy": MaskTraining(strategy="greedy"),
}
TIMES: dict[str, float] = {}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("strategy", ASKED)
def test_a_step(benchmark, strategy: str) -> None:
    torch.manual_seed(0)
    network = ConvNet(None, 3, 10, SIZE, (32, 64, 128)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, label = torch.rand(BATCH, 3, *SIZE), torch.randint(0, 10, (BATCH,))
    masks, draw = mask_set([PatchThreat(5)], SIZE, (7, 7)), torch.Generator().manual_seed(0)
    memory = MaskMemory(BATCH, masks)
    memory.set_batch(torch.arange(BATCH), draw_changes(BATCH, SIZE, Augment(max_shift=4, flip=True), draw))
    loss = MaskLoss(network, network, MaskHierarchy([masks]), ASKED[strategy], 0.5, memory=memory)
    benchmark.pedantic(lambda: loss(images, label, 0.5, draw).backward(), rounds=5, warmup_rounds=1)
    TIMES[strategy] = benchmark.stats.stats.min
    if strategy != "random" and "random" in TIMES:
        times = TIMES[strategy] / TIMES["random"]
        benchmark.extra_info["times_random"] = times
        print(f"\n{strategy}: {times:.2f} times a step under random masks")
