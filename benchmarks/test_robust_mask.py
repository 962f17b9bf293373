"""Certifying robust masking: evidence in, margin of every location out, for all rivals; windows match the attacker.

The baseline is the straightforward program in NumPy: vectorised over classes, a loop over places and windows. It is run
on one picture; ours on a batch. Compare the times per picture, in one run: both store them as ``per_picture_ms``.
"""

import numpy as np
import pytest
import torch

from certipatch.rules import RobustMask, Windows

CASES = {
    "26x26 cells, 1000 classes, windows 8x8": (Windows.boxes((26, 26), (8, 8)), 1000, 8),
    "22x22 cells, 10 classes, windows 6x6": (Windows.boxes((22, 22), (6, 6)), 10, 64),
    "299 circular columns, 1000 classes, windows 66": (Windows.runs(299, 66, circular=True), 1000, 8),
}


def evidence(windows: Windows, classes: int, pictures: int) -> torch.Tensor:
    """Local logits with one class above the others, as a trained network gives them."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(pictures, windows.number_of_views, classes, generator=generator)
    scores[..., 3] += 2.5
    return scores


def baseline(e: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Margins (L,) at T = 0, c = ∞ of one picture (V, K)."""
    e = np.maximum(e.astype(np.float64), 0)
    total = e.sum(0)
    masked = total - np.max([e[w].sum(0) for w in windows], axis=0)
    label = int(masked.argmax())
    margins = []
    for place in windows:
        rest = e.copy()
        rest[place] = 0
        own = rest[:, label]
        lower = own.sum() - max(own[w].sum() for w in windows)
        upper = np.delete(rest.sum(0), label).max()
        margins.append(lower - upper)
    return np.array(margins)


@pytest.mark.parametrize("name", CASES)
def test_certipatch(benchmark, name: str) -> None:
    windows, classes, pictures = CASES[name]
    benchmark.group = name
    e, sees, rule = evidence(windows, classes, pictures), windows.members, RobustMask(windows)
    verdict = benchmark(lambda: rule.certify(e, sees))
    expected = baseline(e[0].numpy(), windows.members.numpy())
    np.testing.assert_allclose(verdict.margin[0].numpy(), expected, rtol=0, atol=1e-8)
    benchmark.extra_info["per_picture_ms"] = 1000 * benchmark.stats.stats.min / pictures


@pytest.mark.parametrize("name", CASES)
def test_numpy_one_picture(benchmark, name: str) -> None:
    windows, classes, _ = CASES[name]
    benchmark.group = name
    e, members = evidence(windows, classes, 1)[0].numpy(), windows.members.numpy()
    benchmark.pedantic(lambda: baseline(e, members), rounds=1)
    benchmark.extra_info["per_picture_ms"] = 1000 * benchmark.stats.stats.min
