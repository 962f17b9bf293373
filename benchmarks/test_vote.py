"""Certifying votes, B = 1024 pictures, V = 32 views, K = 10 classes, from votes to verdicts, 5x5 patches, s = 4.

ART's certification knows the paper's margin only and starts from counts, so the sum of votes is part of its time. Ours
gives a margin for every location (exact) or, with ``margin="paper"``, the same quantity as ART's.
"""

import pytest
import torch

from certipatch import rules
from certipatch.threats import PatchThreat
from certipatch.views import Columns
from certipatch.views.incidence import sees

RELATION = sees(Columns(4), PatchThreat(5), (32, 32)).rows
GENERATOR = torch.Generator().manual_seed(0)
LABEL = torch.randint(10, (1024,), generator=GENERATOR)
CHOSEN = torch.where(
    torch.rand(1024, 32, generator=GENERATOR) < 0.8, LABEL[:, None], torch.randint(10, (1024, 32), generator=GENERATOR)
)
VOTES = torch.nn.functional.one_hot(CHOSEN, 10).bool()
GROUP = "certify votes, B=1024 V=32 K=10"


@pytest.mark.benchmark(group=GROUP)
@pytest.mark.parametrize("margin", ["location", "paper"])
def test_certipatch(benchmark, margin) -> None:
    rule = rules.Vote(margin)
    verdict = benchmark(lambda: rule.certify(VOTES, RELATION))
    assert 0 < verdict.certified.float().mean() <= 1


@pytest.mark.benchmark(group=GROUP)
def test_art(benchmark) -> None:
    ablators = pytest.importorskip("art.estimators.certification.derandomized_smoothing.ablators.pytorch")
    ablator = ablators.ColumnAblatorPyTorch(
        4, channels_first=True, mode="cnn", to_reshape=False, algorithm="levine2020", device_type="cpu",
        original_shape=(3, 32, 32), output_shape=(3, 32, 32),
    )  # fmt: skip
    certified, _, _ = benchmark(lambda: ablator.certify(VOTES.sum(1), 5, LABEL))
    ours = rules.Vote("paper").certify(VOTES, RELATION)
    assert torch.equal(certified, ours.certified)
