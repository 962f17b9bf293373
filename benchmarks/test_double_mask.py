"""PatchCleanser on 32x32 pictures: pairs of masks in full batches against one masked picture at a time; and, where CIFAR-10 is
at hand, pictures that are not certified until that is known against all their pairs.

Full batches also in the fastest way to run the network that is found here, as the commands do (onnxruntime, most often). All
look at all 325 pairs of 25 masks on the same pictures with the same network, and give the same margins.
"""

import os
from pathlib import Path

import pytest
import torch

import certipatch as cp
from certipatch.data import load
from certipatch.models import ConvNet

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
THREAT = cp.PatchThreat(5)


def ready(batch_size: int | None, quick: bool = False) -> cp.PatchCleanser:
    """A defense whose model check is done."""
    torch.manual_seed(0)
    model = ConvNet(None, 3, 10, (32, 32), widths=(8, 16, 32)).eval()
    defense = cp.PatchCleanser(model, THREAT, masks=5, batch_size=batch_size)
    if quick:
        defense.select_backend(IMAGES[:1], 10**6)
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


CIFAR10 = Path(os.environ.get("CERTIPATCH_DATA") or Path(__file__).parents[2] / "shared" / "data") / "cifar10"


@pytest.fixture(scope="module")
def uncertified() -> tuple[cp.PatchCleanser, torch.Tensor]:
    """The trained defense, and pictures that it does not certify."""
    if not CIFAR10.is_dir():
        pytest.skip("needs CIFAR-10 in $CERTIPATCH_DATA")
    defense = cp.load("cifar10-double-mask", threat=THREAT)
    assert isinstance(defense, cp.PatchCleanser)
    defense.all_margins = False
    images = load(str(CIFAR10), "test", limit=12).images(range(12))
    return defense, images[~defense.certify(images, THREAT).certified][:4]


@pytest.mark.benchmark(group="PatchCleanser, masks of three sizes, 4 pictures of CIFAR-10 that are not certified")
@pytest.mark.parametrize("all_margins", [True, False], ids=["all that margins need", "until the verdict is known"])
def test_pictures_that_are_not_certified(benchmark, uncertified, all_margins: bool) -> None:
    """By the way also in passes: at least five times fewer than M(M + 1)/2."""
    defense, images = uncertified
    defense.all_margins = all_margins
    found = benchmark.pedantic(lambda: defense.evidence(images), rounds=1, warmup_rounds=0)
    pairs, passes = defense.number_of_views((32, 32)), found.passes.double().mean().item()
    benchmark.extra_info |= {"pairs": pairs, "passes": passes}
    assert all_margins or passes * 5 <= pairs
