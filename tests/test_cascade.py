"""A cascade: the first network alone where it is confident, all of them elsewhere, and nothing jumps in between."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import certipatch as cp
from certipatch.errors import InputError
from certipatch.model_check import check_model
from certipatch.models import Cascade, CascadeSettings, EnsembleSettings, NullToFill
from certipatch.models.cascade import BLEND_WIDTH
from certipatch.models.quickest import fastest_backend
from certipatch.testing import check_defense
from certipatch.training.mask_search import apply_masks
from certipatch.views import Columns, MaskPairs, mask_set

THREAT = cp.PatchThreat(3)
MEMBERS = ({"name": "conv", "widths": (4, 6)}, {"name": "conv", "widths": (6, 8)})
NULLS = ({"name": "conv", "widths": (4, 6), "encoding": "null"}, MEMBERS[1])


class Reads(nn.Module):
    """The logits that a picture's row holds."""

    encoding = "picture"

    def __init__(self, row: int):
        super().__init__()
        self.row, self.shown = row, 0

    def forward(self, views):
        self.shown += len(views)
        return views[:, 0, self.row]


def rows(n: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Logits of three networks for n pictures, as pictures of three rows."""
    return spread * torch.randn(n, 1, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cascade(exit_gap: float = 0.6, flip_tta: bool = False) -> Cascade:
    return Cascade([Reads(0), Reads(1), Reads(2)], exit_gap, flip_tta).eval()


def lead(logits: torch.Tensor) -> torch.Tensor:
    best = logits.softmax(1).topk(2, 1).values
    return best[:, 0] - best[:, 1]


def test_the_first_alone_all_together_and_between():
    pictures, network = rows(4000), cascade()
    answers, leads = network(pictures).exp(), lead(pictures[:, 0, 0])
    first, every = pictures[:, 0, 0].softmax(1), pictures[:, 0].mean(1).softmax(1)
    sure, unsure = leads >= 0.6, leads <= 0.6 - BLEND_WIDTH
    torch.testing.assert_close(answers[sure], first[sure])
    torch.testing.assert_close(answers[unsure], every[unsure])
    share = ((leads - (0.6 - BLEND_WIDTH)) / BLEND_WIDTH).clamp(0, 1)[:, None]
    torch.testing.assert_close(answers, share * first + (1 - share) * every, atol=1e-6, rtol=0)
    assert 100 < (~sure & ~unsure).sum() < 1000
    assert [part.shown for part in network.parts] == [4000, *[int((~sure).sum())] * 2]
    torch.testing.assert_close(answers.sum(1), torch.ones(4000, dtype=torch.float64))
    network.early_exit = False
    torch.testing.assert_close(network(pictures).exp(), answers)
    torch.testing.assert_close(network.train()(pictures), pictures[:, 0].mean(1))


def test_mirror_images_count_too():
    pictures = rows(500)
    every = (pictures[:, 0] + pictures[:, 0].flip(2)).mean(1) / 2
    unsure = lead(pictures[:, 0, 0]) < 0.5
    torch.testing.assert_close(
        cascade(flip_tta=True)(pictures)[unsure].exp(), every[unsure].softmax(1), atol=1e-6, rtol=0
    )


@given(st.integers(0, 2**32), st.floats(1e-9, 1e-2), st.floats(0.2, 1.0))
def test_rounding_grows_by_the_lipschitz_constant_at_most(seed, off, exit_gap):
    generator = torch.Generator().manual_seed(seed)
    pictures = rows(200, seed)
    edge = rows(200, seed + 1, 0.3)
    edge[:, 0, 0, 0] += 2.0 * torch.rand(200, generator=generator, dtype=torch.float64)  # many leads near the edges
    pictures = torch.cat([pictures, edge])
    network = cascade(exit_gap)
    moved = pictures + off * (2 * torch.rand(pictures.shape, generator=generator, dtype=torch.float64) - 1)
    parts = (pictures.softmax(3) - moved.softmax(3)).abs().amax((1, 2, 3))
    mean = (pictures[:, 0].mean(1).softmax(1) - moved[:, 0].mean(1).softmax(1)).abs().amax(1)
    change = (network(pictures).exp() - network(moved).exp()).abs().amax(1)
    assert (change <= network.lipschitz * torch.maximum(parts, mean) + 3e-7).all()


def test_gradients_are_finite_everywhere():
    pictures = rows(300)
    pictures[:50] *= 100
    pictures[50:60] = 0
    pictures.requires_grad_()
    cascade()(pictures)[:, 0].sum().backward()
    assert torch.isfinite(pictures.grad).all()
    assert (pictures.grad[:, 0, 1] != 0).any(1).float().mean() > 0.3


def trained(members=MEMBERS, **sizes) -> Cascade:
    torch.manual_seed(0)
    network = CascadeSettings(members=members, **sizes).build(None, 3, 4, (12, 12)).eval()
    with torch.no_grad():
        for part in network.parts:
            getattr(part, "network", part).head.weight *= 100
    return network


@pytest.mark.slow
def test_the_model_check_and_its_tolerance():
    images = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    views = MaskPairs(mask_set([THREAT], (12, 12), (3, 3), None))
    network = trained(exit_gap=0.5, flip_tta=True)
    one = cp.PatchCleanser(network, THREAT, masks=3)
    tolerance = one.tolerance(images)
    assert tolerance.atol >= network.lipschitz * 1e-6
    network.lipschitz = 1.0
    assert check_model(cp.PatchCleanser(network, THREAT, masks=3).model, views, images).atol < tolerance.atol / 10


def test_networks_of_filled_pictures_beside_those_of_null_encoded_ones():
    network, images = trained(NULLS, flip_tta=True), torch.rand(6, 3, 12, 12)
    first, filled = network.parts
    assert (network.encoding, first.encoding, filled.network.encoding) == ("null", "null", "picture")
    hidden = mask_set([THREAT], (12, 12), (3, 3), None)[:6]
    shown, painted = (apply_masks(encoding, images, hidden, 0.5) for encoding in ("null", "picture"))
    torch.testing.assert_close(filled(shown), filled.network(painted))
    mean = first(shown) + first(shown.flip(3)) + filled.network(painted) + filled.network(painted.flip(3))
    network.exit_gap = 1.0
    torch.testing.assert_close(network(shown).exp(), (mean / 4).softmax(1), atol=1e-4, rtol=0)
    filled.network.fill, per_channel = (0.1, 0.2, 0.3), apply_masks("picture", images, hidden, (0.1, 0.2, 0.3))
    torch.testing.assert_close(NullToFill(filled.network)(shown), filled.network(per_channel))


@pytest.mark.slow
@pytest.mark.parametrize("members", [MEMBERS, NULLS], ids=["filled", "NULL-encoded"])
def test_certificates_hold_and_faster_ways_answer_alike(members):
    images = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    network = trained(members, flip_tta=True)
    nothing = torch.zeros(8, 12, 12, dtype=torch.bool)
    shown = apply_masks(network.encoding, images, nothing)
    network.exit_gap = float(lead(network.parts[0](shown).detach()).median())
    defense = cp.PatchCleanser(network, THREAT, masks=3, fill=0.5)
    tried = check_defense(defense, images, THREAT, slack=1e-3, trials=4)
    assert tried.certified > 20
    for way in ("channels last", "onnxruntime"):
        name, run = fastest_backend(network, shown[:2], 1000, way)
        if name == way:
            assert run is not None
            torch.testing.assert_close(run(shown), network(shown), atol=1e-3, rtol=1e-3)
        else:
            pytest.importorskip("onnxruntime")
            raise AssertionError(name)
    assert fastest_backend(network, shown[:2], 1, None) == ("torch", None)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="ensemble network has no 'exit_gap'; it has name, members"):
        EnsembleSettings(members=MEMBERS, **{"exit_gap": 0.5})
    with pytest.raises(ValueError, match="cascade network has no 'widths'; it has name, members, exit_gap, flip_tta"):
        CascadeSettings(members=MEMBERS, **{"widths": (4,)})
    with pytest.raises(ValueError, match=r"members\n.*Field required"):
        CascadeSettings(**{})
    with pytest.raises(InputError, match="mirrors whole pictures"):
        CascadeSettings(members=MEMBERS, flip_tta=True).build(Columns(4, 4), 3, 4, (12, 12))
    mixed = (MEMBERS[0], {"name": "resnet18", "widths": (4, 4), "depth": 1})
    with pytest.raises(InputError, match="read pictures in the same way"):
        CascadeSettings(members=mixed).build(Columns(4, 4), 3, 4, (12, 12))
    with pytest.raises(InputError, match="cannot be traced"):
        cp.IntervalBounds(trained()).certify(torch.rand(1, 3, 12, 12), THREAT)


@pytest.mark.slow
def test_logits_of_a_cascade_are_no_evidence():
    """Rounding moves the logarithm of a small confidence by more than its share of the blend."""
    columns = Columns(4, 4)
    network = CascadeSettings(members=MEMBERS).build(columns, 3, 4, (12, 12)).eval()
    images = torch.rand(2, 3, 12, 12)
    with pytest.raises(InputError, match="a cascade's confidences are bounded"):
        cp.PatchGuard(network, THREAT, columns, score_type="logits").certify(images, THREAT)
    assert cp.PatchGuard(network, THREAT, columns, score_type="confidence").certify(images, THREAT).label.shape == (2,)


def test_settings_are_kept():
    settings = CascadeSettings(members=MEMBERS, exit_gap=0.4, flip_tta=True)
    again = CascadeSettings.model_validate(json.loads(settings.model_dump_json()))
    network = again.build(None, 3, 4, (12, 12))
    assert (network.exit_gap, network.flip_tta) == (0.4, True)
    assert CascadeSettings(members=MEMBERS).build(None, 3, 4, (12, 12)).exit_gap == 0.6
