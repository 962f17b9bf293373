"""Evidence of all 32 column bands of CIFAR-10-sized pictures: one strip pass against 32 NULL-encoded passes.

Both networks have the same layers: the NULL network is the strip network's twin, with the same widths and depth, that
reads the whole 32x32 ablated picture for every band, as the original code does.
"""

import pytest
import torch

from certipatch.evidence import logits
from certipatch.models import ResNet18, StripNet
from certipatch.views import Columns

VIEWS = Columns(4)
IMAGES = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WIDTHS = (48, 96, 160)


@pytest.mark.benchmark(group="evidence of 32 bands, 16 pictures")
def test_null_encoded_passes(benchmark) -> None:
    model = ResNet18(3, 10, WIDTHS, depth=1).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    answer = benchmark.pedantic(lambda: logits(model, VIEWS, IMAGES, batch_size=256), rounds=3, warmup_rounds=1)
    assert answer.shape == (16, 32, 10)


@pytest.mark.benchmark(group="evidence of 32 bands, 16 pictures")
def test_strip_network(benchmark) -> None:
    model = StripNet(VIEWS, 3, 10, (32, 32), WIDTHS, depth=1).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    answer = benchmark.pedantic(lambda: logits(model, VIEWS, IMAGES), rounds=10, warmup_rounds=1)
    assert answer.shape == (16, 32, 10)
