"""Derandomized smoothing end to end: tiny random networks, every kind of threat, patches pasted at certified places."""

import pytest
import torch
from torch import nn

import certipatch as cp
from certipatch import evidence as ev
from certipatch import model_check
from certipatch import views as vw
from certipatch.certificate import Certificate
from certipatch.defenses import DerandomizedSmoothing, base
from certipatch.errors import InputError
from certipatch.models import NETWORKS
from certipatch.testing import check_defense
from certipatch.threats import PatchThreat, SparseThreat
from certipatch.views.incidence import sees

SIZE = (6, 7)


def pictures(number=6):
    """Pictures from flat to noisy, so that views agree on some and not on others."""
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(number, 1, 1, 1, generator=generator)
    noise = torch.rand(number, 1, *SIZE, generator=generator)
    return base + (noise - base) * torch.linspace(0, 1, number).view(-1, 1, 1, 1)


def defense(name="strip", views=None, threshold=0.4, seed=1, **settings):
    """A random network of three classes whose answers are confident, yet differ from picture to picture."""
    torch.manual_seed(seed)
    views = views or vw.Columns(2)
    chosen = NETWORKS[name](widths=(8, 16), depth=1)
    network = chosen.build(views, 1, 3, SIZE).eval().requires_grad_(False)
    answers = ev.logits(network, views, pictures())
    mean, spread = answers.mean((0, 1)), answers.std((0, 1))
    network.head.weight.copy_(network.head.weight * (3 / spread)[:, None])
    network.head.bias.copy_((network.head.bias - mean) * 3 / spread)
    return DerandomizedSmoothing(network, views, threshold, **settings)


CASES = [
    ("strip", vw.Columns(2), PatchThreat(1)),
    ("strip", vw.Rows(2, stride=2), PatchThreat(1)),
    ("strip", vw.Blocks(2), PatchThreat(2)),
    ("strip", vw.Blocks(2, wrap=False), PatchThreat(4, shape="diamond")),
    ("strip", vw.Columns(1), PatchThreat(1, count=2)),
    ("strip", vw.Blocks(2, stride=2), SparseThreat(1)),
    ("strip", vw.Columns(1), PatchThreat((4, 1), where="corners")),
    ("crop", vw.Columns(2), PatchThreat(2)),
    ("crop", vw.Blocks(3, 2), PatchThreat(1)),
    ("resnet18", vw.Columns(2), PatchThreat(1)),
    ("resnet18", vw.Blocks(2, 2, count=2), PatchThreat(1)),
    ("resnet18", vw.Rows(1), PatchThreat(torch.eye(2).bool())),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "views", "threat"), CASES, ids=lambda c: str(c))
@pytest.mark.parametrize("threshold", [0.4, None])
def test_no_patch_breaks_a_certificate(name, views, threat, threshold):
    tried = check_defense(defense(name, views, threshold), pictures(), threat, trials=12, seed=1)
    assert tried.attacks >= 8 * tried.attacked > 0
    assert tried.locations >= tried.certified >= tried.attacked


@pytest.mark.slow
def test_patches_have_an_effect_where_nothing_is_certified():
    tried = check_defense(defense(views=vw.Blocks(2)), pictures(), PatchThreat(3), trials=16)
    assert tried.attacks_elsewhere > tried.changed > 0


@pytest.mark.parametrize("threshold", [0.4, None])
@pytest.mark.parametrize(
    "threat", [PatchThreat(2), PatchThreat((1, 3)), PatchThreat(1, count=2), PatchThreat(5, shape="line")]
)
def test_margins_by_the_book(threshold, threat):
    views = vw.Columns(2, stride=2)
    smoothing = defense("crop", views, threshold)
    scores = torch.softmax(ev.logits(smoothing.model, views, pictures()), -1)
    cert = smoothing.certify(pictures(), threat)
    relation = sees(views, threat, SIZE)
    assert cert.margin.shape == (6, len(relation.row_of))
    tolerance = smoothing.tolerance(pictures())
    for b in range(6):
        if threshold is None:
            votes = [[k == max(range(3), key=lambda k: (s[k], -k)) for k in range(3)] for s in scores[b].tolist()]
        else:
            votes = [[x > threshold for x in s] for s in scores[b].tolist()]
            assert ((scores[b] - threshold).abs() > 2 * tolerance.atol).all()  # no view is unsure
        total = [sum(v[k] for v in votes) for k in range(3)]
        label = total.index(max(total))
        assert cert.label[b] == label
        for location, row in enumerate(relation.rows[relation.row_of].tolist()):
            out = [sum(v[k] for v, s in zip(votes, row, strict=True) if not s) for k in range(3)]
            margin = min(out[label] - out[k] - sum(row) - (label > k) for k in range(3) if k != label) + 1
            assert cert.margin[b, location] == margin


def test_certificate_of_one_patch():
    cert = defense(views=vw.Blocks(2)).certify(pictures(), PatchThreat((2, 3)))
    assert cert.sees is not None
    assert cert.margin.shape == (6, 5 * 5)
    assert torch.equal(cert.certified, (cert.margin > 0).all(1))
    assert (cert.notion, cert.alarm, cert.confidence) == ("recovery", None, 1.0)
    assert "exact" in cert.theorem
    for b in range(6):
        expected = torch.full(SIZE, torch.inf, dtype=torch.float64)
        for location in range(25):
            top, left, height, width = cert.box(location)
            assert (top, left, height, width) == (location // 5, location % 5, 2, 3)
            part = expected[top : top + height, left : left + width]
            part.copy_(part.clamp(max=cert.margin[b, location].item()))
        assert torch.equal(cert.map(b), expected)
        assert cert.margin[b, cert.weakest[b]] == cert.margin[b].min()


def test_a_map_of_odd_shapes_and_few_places():
    threat = PatchThreat(torch.tensor([[1, 0], [0, 1]]).bool(), where=[(0, 0), (4, 5)])
    vulnerable = defense().certify(pictures(), threat).map(0)
    assert torch.isfinite(vulnerable).nonzero().tolist() == [[0, 0], [1, 1], [4, 5], [5, 6]]


def test_a_sparse_threat_has_one_location_and_no_places():
    cert = defense(views=vw.Blocks(2)).certify(pictures(), SparseThreat(2))
    assert cert.margin.shape == (6, 1)
    assert cert.box(0) is None
    two = defense(views=vw.Blocks(2)).certify(pictures(), PatchThreat(1, count=2))
    assert torch.equal(cert.margin[:, 0], two.margin.amin(1))
    with pytest.raises(ValueError, match="map needs"):
        cert.map(0)


def test_pairs_of_patches_have_no_map_even_where_there_are_as_many_as_pixels():
    # 3 undominated rows give 6 pairs, and a 2x3 picture has 6 places.
    threat = PatchThreat(1, count=2)
    relation = sees(vw.Columns(1), threat, (2, 3))
    assert len(relation.choices) == len(relation.locations) == 6
    cert = Certificate(torch.zeros(1).long(), torch.arange(6.0).double()[None], threat, "any", relation)
    with pytest.raises(ValueError, match="map needs"):
        cert.map(0)


@pytest.mark.parametrize("threshold", [0.4, None])
@pytest.mark.parametrize("views", [vw.Columns(2), vw.Columns(3, 2), vw.Blocks(2, wrap=False)])
def test_the_paper_margin_never_exceeds_the_margin_of_any_location(views, threshold):
    location, paper = (defense("strip", views, threshold, margin=m) for m in ("location", "paper"))
    stronger = 0
    for side in (1, 2, 3):
        ours, theirs = (d.certify(pictures(), PatchThreat(side)) for d in (location, paper))
        assert torch.equal(ours.label, theirs.label)
        assert (theirs.margin <= ours.margin).all()
        assert "Levine" in theirs.theorem
        stronger += int((ours.margin > theirs.margin).sum())
    assert stronger > 0


@pytest.mark.parametrize("margin", ["location", "paper"])
def test_largest_patch(margin):
    smoothing = defense(views=vw.Blocks(2), margin=margin)
    evidence = smoothing.evidence(pictures())
    certified = torch.stack([smoothing.certify(pictures(), PatchThreat(m)).certified for m in range(1, 7)])
    assert torch.equal(smoothing.largest_patch(evidence), certified.long().cumprod(0).sum(0))


def test_unsure_views_belong_to_the_attacker(monkeypatch):
    smoothing = defense(views=vw.Blocks(2))
    sure = smoothing.certify(pictures(), PatchThreat(1))
    monkeypatch.setattr(DerandomizedSmoothing, "tolerance", lambda *_: ev.Tolerance(0.1, 0.0))
    doubtful = smoothing.certify(pictures(), PatchThreat(1))
    assert torch.equal(doubtful.label, sure.label)
    assert (doubtful.margin <= sure.margin).all()
    assert (doubtful.margin < sure.margin).any()
    monkeypatch.setattr(DerandomizedSmoothing, "tolerance", lambda *_: ev.Tolerance(1.0, 0.0))
    assert not smoothing.certify(pictures(), PatchThreat(1)).certified.any()


def test_pictures_of_any_make_and_any_batch_size():
    expected = defense("resnet18").certify(pictures(), PatchThreat(1))
    for batch_size in (1, 5, 7):
        assert torch.equal(
            defense("resnet18", batch_size=batch_size).certify(pictures(), PatchThreat(1)).margin, expected.margin
        )
    turned = pictures().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    cert = defense("resnet18").certify(turned, PatchThreat(1))
    assert torch.equal(cert.margin, expected.margin)
    assert not cert.margin.requires_grad


def test_one_check_per_size_and_one_relation_per_threat(monkeypatch):
    calls = []
    real = model_check.check_model
    monkeypatch.setattr(base, "check_model", lambda *a, **k: calls.append(1) or real(*a, **k))
    smoothing = defense("crop", vw.Rows(2))
    for _ in range(2):
        smoothing.certify(pictures(), PatchThreat(2))
        smoothing.predict(pictures(2))
    assert len(calls) == 1
    assert smoothing.relation(PatchThreat(2), SIZE) is smoothing.relation(PatchThreat(2), SIZE)
    assert smoothing.forward_passes(SIZE) == 6
    assert defense("strip").forward_passes(SIZE) == 1


def test_bad_settings_and_threats():
    for bad in ({"threshold": 1.0}, {"threshold": -0.1}, {"batch_size": 0}, {"margin": "best"}):
        with pytest.raises(ValueError):  # noqa: PT011
            DerandomizedSmoothing(nn.Identity(), vw.Columns(2), **bad)
    with pytest.raises(InputError, match="does not fit"):
        defense().certify(pictures(), PatchThreat(7))
    with pytest.raises(ValueError, match="does not fit"):
        defense("resnet18", vw.Columns(2)).certify(torch.rand(1, 1, 8, 1), PatchThreat(1))


def test_answers_that_stop_being_finite_after_the_check():
    smoothing = defense("strip")
    smoothing.predict(pictures())
    smoothing.model.head.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        smoothing.certify(pictures(), PatchThreat(1))


def test_names_at_the_top():
    assert cp.DerandomizedSmoothing is DerandomizedSmoothing
    assert cp.PatchThreat is PatchThreat
    assert cp.testing.check_defense is check_defense
