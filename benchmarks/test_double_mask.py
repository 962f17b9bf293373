"""PatchCleanser on 32x32 pictures: pairs of masks in full batches against one masked picture at a time.

Full batches also in the fastest way to run the network that is found here, as the commands do (onnxruntime, most often). All
look at all 325 pairs of 25 masks on the same pictures with the same network, and give the same margins.
"""

import pytest
import torch

import certipatch as cp
from certipatch.models import ConvNet

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
THREAT = cp.PatchThreat(5)


def ready(batch_size: int | None, quick: bool = False) -> cp.PatchCleanser:
    """A defense whose model check is done."""
    torch.manual_seed(0)
    model = ConvNet(None, 3, 10, (32, 32), widths=(8, 16, 32)).eval()
    defense = cp.PatchCleanser(model, THREAT, masks=5, batch_size=batch_size)
    if quick:
        defense.quicken(IMAGES[:1], 10**6)
    defense.certify(IMAGES, THREAT)
    return defense


@pytest.mark.benchmark(group="PatchCleanser, 25 masks, 4 pictures")
def test_one_mask_at_a_time(benchmark) -> None:
    defense = ready(1)
    found = benchmark.pedantic(lambda: defense.certify(IMAGES, THREAT), rounds=3, warmup_rounds=1)
    assert found.margin.shape == (4, 28 * 28)


@pytest.mark.benchmark(group="PatchCleanser, 25 masks, 4 pictures")
def test_full_batches(benchmark) -> None:
    defense = ready(None)
    found = benchmark.pedantic(lambda: defense.certify(IMAGES, THREAT), rounds=5, warmup_rounds=1)
    assert found.margin.shape == (4, 28 * 28)


@pytest.mark.benchmark(group="PatchCleanser, 25 masks, 4 pictures")
def test_full_batches_in_the_fastest_way(benchmark) -> None:
    defense = ready(None, quick=True)
    found = benchmark.pedantic(lambda: defense.certify(IMAGES, THREAT), rounds=5, warmup_rounds=1)
    assert found.margin.shape == (4, 28 * 28)
