"""``sees`` for every location of a 224x224 picture, against the literal definition on the same pixel sets."""

import pytest
import torch

from certipatch.threats import PatchThreat
from certipatch.views import Columns, ReceptiveFields, Views
from certipatch.views.incidence import sees

SIZE = (224, 224)
THREAT = PatchThreat("2%")
GROUP = "sees at 224x224, 2 % patch, 224 columns"


def literal(views: Views) -> torch.Tensor:
    """One location at a time: does any visible pixel of each view lie in it? Vectorised over views and pixels."""
    visible = views.visible(SIZE)
    side = len(THREAT.masks(SIZE)[0])
    places = range(0, SIZE[0] - side + 1, 16)  # every 16th row and column: 1/256 of the locations
    return torch.stack([visible[:, t : t + side, le : le + side].flatten(1).any(1) for t in places for le in places])


@pytest.mark.benchmark(group=GROUP)
def test_all_locations(benchmark) -> None:
    found = benchmark.pedantic(lambda: sees(Columns(25), THREAT, SIZE), rounds=3)
    assert len(found.row_of) == 193**2


@pytest.mark.benchmark(group=GROUP)
def test_literal_on_a_256th_of_the_locations(benchmark) -> None:
    assert benchmark.pedantic(lambda: literal(Columns(25)), rounds=3).shape[1] == 224


@pytest.mark.benchmark(group="sees at 224x224, 2 % patch, 26x26 receptive fields")
def test_receptive_fields(benchmark) -> None:
    fields = ReceptiveFields((17, 17), (8, 8), (0, 0), (26, 26))
    assert len(benchmark.pedantic(lambda: sees(fields, THREAT, SIZE), rounds=3).row_of) == 193**2
