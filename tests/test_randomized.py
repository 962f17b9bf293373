"""Randomized ablation: Δ against the whole family, bounds against scipy, certificates against the exact classifier."""

import json
import sys
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, product
from math import comb, nextafter

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from support import stripes, write_parquet, write_recipe
from torch import nn

import certipatch as cp
from certipatch import cli, models
from certipatch import evidence as ev
from certipatch import views as vw
from certipatch.defenses import DerandomizedSmoothing, RandomizedAblation
from certipatch.defenses.randomized_ablation import delta
from certipatch.errors import InputError
from certipatch.rules import ClopperPearson
from certipatch.rules.clopper_pearson import ROUNDING, lower_bound
from certipatch.saved import open_defense
from certipatch.testing import check_defense
from certipatch.threats import PatchThreat, SparseThreat
from certipatch.training import read, train
from certipatch.views.random import chance_to_touch, subsets

SIZE = (3, 4)
PIXELS = list(product(range(SIZE[0]), range(SIZE[1])))


def literal_family(views):
    """Every view of a family, as a set of pixels."""
    if isinstance(views, vw.RandomPixels):
        return [set(chosen) for chosen in combinations(PIXELS, views.keep)]
    if isinstance(views, vw.RandomColumns):
        return [{p for p in PIXELS if p[1] in chosen} for chosen in combinations(range(SIZE[1]), views.keep)]
    return [set(map(tuple, shown.nonzero().tolist())) for shown in views.parts.visible(SIZE)]


def literal_locations(threat):
    """Every set of pixels that an attacker may own."""
    if isinstance(threat, SparseThreat):
        return [set(chosen) for chosen in combinations(PIXELS, threat.pixels)]
    single = threat.locations(SIZE)
    places = [set(map(tuple, single.pixels(i).nonzero().tolist())) for i in range(len(single))]
    return [set().union(*chosen) for chosen in combinations_with_replacement(places, threat.count)]


def rounded_up(exact):
    return float(exact) if Fraction(float(exact)) >= exact else nextafter(float(exact), 2)


FAMILIES = [
    vw.RandomPixels(1), vw.RandomPixels(3), vw.RandomPixels(12), vw.RandomColumns(1), vw.RandomColumns(2),
    vw.OneOf(vw.Columns(2)), vw.OneOf(vw.Columns(3, wrap=False)), vw.OneOf(vw.Columns(1, count=2)),
    vw.OneOf(vw.Blocks(2, 2)), vw.OneOf(vw.Rows(2, stride=2)), vw.OneOf(vw.Columns(2, stride=3)),
]  # fmt: skip
THREATS = [
    PatchThreat(1), PatchThreat(2), PatchThreat((1, 3)), PatchThreat((3, 4)), PatchThreat(4, shape="diamond"),
    PatchThreat(5, shape="rectangle"), PatchThreat(torch.eye(2).bool()), PatchThreat(2, where="corners"),
    PatchThreat(1, count=2), PatchThreat(2, count=2), PatchThreat((2, 3), count=3), SparseThreat(1), SparseThreat(2),
    SparseThreat(3), SparseThreat(5),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("views", FAMILIES, ids=lambda v: str(v.settings()))
def test_delta_is_the_share_of_the_whole_family(views):
    family = literal_family(views)
    for threat in THREATS:
        found, relation = delta(views, threat, SIZE)
        exact = [
            Fraction(sum(bool(view & owned) for view in family), len(family)) for owned in literal_locations(threat)
        ]
        assert found.max().item() == rounded_up(max(exact)), threat
        if isinstance(threat, SparseThreat):
            assert relation is None
            assert len(found) == 1
        elif threat.count == 1:  # location by location
            assert found.tolist() == [rounded_up(share) for share in exact]
            assert relation is not None
            assert len(relation.row_of) == len(exact)


def test_delta_of_the_paper():
    assert chance_to_touch(64, 4, 9) == pytest.approx(0.463, abs=5e-4)  # caption of its Fig. 2
    assert delta(vw.OneOf(vw.Columns(6)), PatchThreat(5), (28, 28))[0].unique().item() == rounded_up(Fraction(10, 28))


@pytest.mark.parametrize(("parts", "keep"), [(784, 45), (1024, 75), (50176, 500), (30, 7)])
def test_delta_is_never_understated(parts, keep):
    for touched in (0, 1, 2, 9, 25, parts - keep, parts - keep + 1, parts):
        exact = 1 - Fraction(comb(parts - touched, keep), comb(parts, keep))
        found = chance_to_touch(parts, keep, touched)
        assert nextafter(found, -1) < exact <= found <= 1


def test_attacked_columns_that_no_greedy_choice_finds_are_gone_through():
    # The pixel seen by most of these views is in neither of the two that all five views see together.
    shown = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1]]).bool()
    views = vw.OneOf(vw.PixelSets(shown[:, None]))
    for pixels in (1, 2, 3):
        exact = max(int(shown[:, list(chosen)].any(1).sum()) for chosen in combinations(range(3), pixels))
        assert delta(views, SparseThreat(pixels), (1, 3))[0].item() == rounded_up(Fraction(exact, 5))


def test_subsets_are_uniform_and_ties_are_drawn_again(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    real = torch.rand
    coarse = lambda *size, **kw: (real(*size, **kw) * 4).floor()  # noqa: E731
    for rand in (real, coarse):  # with four values for five keys nearly every row has ties
        monkeypatch.setattr(torch, "rand", rand)
        chosen = subsets(20_000, 5, 2, generator)
        assert (chosen.sum(1) == 2).all()
        code = (chosen * 2 ** torch.arange(5)).sum(1)
        counts = np.unique(code.numpy(), return_counts=True)[1]
        assert len(counts) == 10
        assert chisquare(counts).pvalue > 1e-3
    assert subsets(3, 4, 4, generator).all()


def test_views_drawn_are_views_of_the_family():
    for views in FAMILIES:
        family = literal_family(views)
        drawn = views.draw(SIZE, 50, torch.Generator().manual_seed(1))
        assert all(set(map(tuple, view.nonzero().tolist())) in family for view in drawn)
        again = views.draw(SIZE, 50, torch.Generator().manual_seed(1))
        assert torch.equal(drawn, again)
        assert vw.create(views.settings()) == views


@pytest.mark.parametrize("bad", [0, -1, True])
def test_keep_is_a_positive_whole_number(bad):
    for family in (vw.RandomPixels, vw.RandomColumns):
        with pytest.raises(InputError, match="keep must be"):
            family(bad)


def test_more_than_a_picture_has_cannot_be_kept():
    with pytest.raises(InputError, match="cannot keep 13 of the 12"):
        vw.RandomPixels(13).check(SIZE)
    with pytest.raises(InputError, match="use keep <= 4"):
        delta(vw.RandomColumns(5), PatchThreat(1), SIZE)


# the bound


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_bound_is_the_exact_one_of_scipy(alpha):
    for samples in (1, 2, 7, 100, 10_000):
        successes = np.unique(np.linspace(0, samples, 9).astype(int))
        found = lower_bound(successes, samples, alpha)
        for k, bound in zip(successes.tolist(), found, strict=True):
            test = binomtest(k, samples, alternative="greater").proportion_ci(1 - alpha, method="exact")
            assert bound == pytest.approx(test.low, abs=1e-12)


def test_rounding_of_the_bound_is_paid_for():
    for samples, alpha in ((1, 0.05), (12, 0.05), (40, 1e-3), (40, 1e-6)):
        for k in range(1, samples + 1):
            bound = float(lower_bound(np.array([k]), samples, alpha)[0])
            p = Fraction(bound) - Fraction(ROUNDING)
            tail = sum(comb(samples, j) * p**j * (1 - p) ** (samples - j) for j in range(k, samples + 1))
            assert tail <= Fraction(alpha)


@pytest.mark.parametrize("share", [0.3, 0.62, 0.9])
def test_coverage(share):
    draws = np.random.default_rng(0).binomial(60, share, 100_000)
    for alpha in (0.05, 0.2):
        wrong = (lower_bound(draws, 60, alpha) > share).mean()
        assert wrong <= alpha + 4 * (alpha / 100_000) ** 0.5


def counts_of(pick, bound):
    return torch.stack([torch.as_tensor(pick), torch.as_tensor(bound)])[None]


def test_a_share_at_the_limit_is_certified_with_a_chance_of_alpha():
    delta_ = torch.tensor([0.25], dtype=torch.float64)
    generator = np.random.default_rng(1)
    for samples, alpha in ((200, 0.05), (1000, 0.2)):
        rule = ClopperPearson(samples, alpha)
        bound = generator.multinomial(samples, [0.05, 0.75, 0.2], 20_000)
        pick = generator.multinomial(20, [0.05, 0.75, 0.2], 20_000)
        verdict = rule.certify(torch.from_numpy(np.stack([pick, bound], 1)), delta_)
        wrong = (verdict.margin[:, 0] > 0).double().mean().item()
        assert 0 < wrong <= alpha + 4 * (alpha / 20_000) ** 0.5
        clear = generator.multinomial(samples, [0.05, 0.9, 0.05], 1000)
        assert rule.certify(torch.from_numpy(np.stack([clear, clear], 1)), delta_).certified.double().mean() > 0.95


def test_the_class_is_picked_by_the_first_sample_alone():
    rule = ClopperPearson(100, 0.05)
    none = torch.zeros(1, dtype=torch.float64)
    assert rule.predict(counts_of([5, 6, 4], [100, 0, 0])).item() == 1
    assert rule.predict(counts_of([5, 5, 4], [0, 100, 0])).item() == 0  # a tie: the smaller index
    assert not rule.certify(counts_of([5, 6, 4], [100, 0, 0]), none).certified  # the other sample does not pick
    verdict = rule.certify(counts_of([5, 6, 4], [0, 100, 0]), torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64))
    assert verdict.margin[0].tolist() == pytest.approx([0.05**0.01 - 0.5 - d - ROUNDING for d in (0, 0.4, 1)])
    assert "0.95" in rule.theorem


@pytest.mark.parametrize(
    ("counts", "delta_", "message"),
    [
        (torch.zeros(1, 2, 1), torch.zeros(1), "K >= 2"),
        (torch.zeros(1, 3, 2), torch.zeros(1), "shape"),
        (torch.full((1, 2, 2), 0.5), torch.zeros(1), "whole"),
        (torch.full((1, 2, 2), torch.nan), torch.zeros(1), "whole"),
        (torch.full((1, 2, 2), -1), torch.zeros(1), "whole"),
        (torch.full((1, 2, 2), 6), torch.zeros(1), "cannot give 12 votes"),
        (torch.zeros(1, 2, 2), torch.zeros(0), "L >= 1"),
        (torch.zeros(1, 2, 2), torch.tensor([1.5]), "chance"),
        (torch.zeros(1, 2, 2), torch.tensor([torch.nan]), "chance"),
    ],
)
def test_the_rule_refuses_what_is_no_sample(counts, delta_, message):
    with pytest.raises(ValueError, match=message):
        ClopperPearson(10).certify(counts, delta_)


def test_bad_settings():
    for bad in ({"alpha": 0.0}, {"alpha": 1.0}, {"samples": 0}, {"samples_to_pick": True}, {"samples": 10**8},
                {"seed": -1}, {"batch_size": 0}):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011
            RandomizedAblation(nn.Identity(), vw.RandomPixels(2), **bad)


# the defense


class Brightness(nn.Module):
    """Reads NULL-encoded views: a few random features of the visible pixels, and whether they are bright."""

    encoding = "null"

    def __init__(self, size, seed, classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inputs = 2 * size[0] * size[1]
        self.first = nn.Parameter(torch.randn(inputs, 8, generator=generator) * 0.6)
        self.second = nn.Parameter(torch.randn(8, classes, generator=generator) * 0.4)

    def forward(self, x):
        bright = x[:, 0].sum((1, 2)) - x[:, 1].sum((1, 2))
        return torch.tanh(x.flatten(1) @ self.first) @ self.second + torch.stack([-bright, bright, 0 * bright], 1)


def exact_shares(model, views, images, size):
    """Share of the whole family that votes for each class: the smoothed classifier, exactly."""
    family = literal_pixels(views, size)
    answers = ev.logits(model, vw.PixelSets(family), images).argmax(-1)
    return nn.functional.one_hot(answers, 3).double().mean(1)


def literal_pixels(views, size):
    parts = views.parts.visible(size)
    return torch.stack([parts[list(chosen)].any(0) for chosen in combinations(range(len(parts)), views.keep)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("views", "threat"),
    [
        (vw.RandomPixels(2), SparseThreat(1)),
        (vw.RandomPixels(1), SparseThreat(2)),
        (vw.RandomPixels(1), PatchThreat((1, 2))),
        (vw.RandomColumns(1), PatchThreat(1)),
        (vw.OneOf(vw.Columns(2, wrap=False)), PatchThreat(1)),
    ],
    ids=str,
)
def test_no_attack_changes_the_smoothed_classifier_on_a_certified_picture(views, threat):
    size, values = (2, 4), torch.tensor([0.0, 1.0])
    pictures = torch.cartesian_prod(*[values] * 8).view(-1, 1, *size)[::20]
    pictures = torch.cat([pictures, 0.15 * pictures + 0.8, pictures * 0.2])
    if isinstance(threat, SparseThreat):
        sets = list(combinations(range(8), threat.pixels))
    else:
        places = threat.locations(size)
        sets = [places.pixels(i).flatten().nonzero().flatten().tolist() for i in range(len(places))]
    certified = open_ = broken = 0
    for seed in range(2):
        model = Brightness(size, seed).eval().requires_grad_(False)
        defense = RandomizedAblation(model, views, samples=1500, samples_to_pick=200, alpha=1e-9, seed=seed)
        cert = defense.certify(pictures, threat)
        shares = exact_shares(model, views, pictures, size)
        for b in range(len(pictures)):
            codes = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * len(sets[0])).view(-1, len(sets[0]))
            attacked = pictures[b].flatten().repeat(len(sets), len(codes), 1)
            for location, owned in enumerate(sets):
                attacked[location][:, owned] = codes
            answers = exact_shares(model, views, attacked.view(-1, 1, *size), size).argmax(1).view(len(sets), -1)
            margin = cert.margin[b].expand(len(sets))  # a sparse threat has one for all choices of pixels
            sure = margin > 0
            assert (answers[sure] == cert.label[b]).all()
            assert not sure.any() or shares[b].argmax() == cert.label[b]
            certified, open_ = certified + int(sure.sum()), open_ + int((~sure).sum())
            broken += int((answers[~sure] != shares[b].argmax()).any(1).sum())
    assert certified > 50
    assert open_ > 50
    assert broken > 10  # where nothing is certified, attacks succeed


def pictures(number=5, size=(6, 7)):
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(number, 1, 1, 1, generator=generator)
    noise = torch.rand(number, 1, *size, generator=generator)
    return base + (noise - base) * torch.linspace(0, 1, number).view(-1, 1, 1, 1)


def clear(views, **settings):
    """A defense around a network that tells bright pictures from dark ones."""
    model = Brightness((6, 7), 0).eval().requires_grad_(False)
    return RandomizedAblation(model, views, **({"samples": 400, "samples_to_pick": 100, "alpha": 1e-4} | settings))


FEW = [vw.RandomPixels(3), vw.RandomColumns(1), vw.Columns(2), vw.Columns(2, wrap=False), vw.Blocks(2)]


@pytest.mark.slow
@pytest.mark.parametrize("views", FEW, ids=str)
@pytest.mark.parametrize("threat", [PatchThreat(1), PatchThreat(1, count=2), SparseThreat(1)], ids=str)
def test_no_patch_breaks_a_certificate(views, threat):
    images = torch.cat([0.1 * pictures(2), 0.9 + 0.1 * pictures(1)])
    tried = check_defense(clear(views), images, threat, trials=3)
    assert tried.attacks > 0


@pytest.mark.parametrize("views", FEW, ids=str)
def test_answers_depend_on_the_picture_and_the_seed_alone(views):
    defense, images = clear(views), pictures()
    whole = defense.evidence(images).values
    assert whole[:, 0].sum(1).tolist() == [100] * 5
    assert (whole[:, 1].sum(1) <= 400).all()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(defense.evidence(images[order]).values, whole[order])
    assert torch.equal(torch.cat([defense.evidence(image[None]).values for image in images]), whole)
    assert torch.equal(clear(views, batch_size=7).evidence(images).values, whole)
    assert torch.equal(defense.evidence(images.to(memory_format=torch.channels_last)).values, whole)
    assert not torch.equal(clear(views, seed=1).evidence(images).values, whole)


@pytest.mark.parametrize("views", [vw.RandomPixels(3), vw.Columns(2)], ids=str)
def test_the_two_samples_are_separate(views):
    defense, images = clear(views), pictures(2)
    family, drawn = defense.family((6, 7)), []
    name = "choose" if isinstance(family, vw.OneOf) else "draw"
    real = getattr(type(family), name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(family), name, lambda *a: drawn.append(real(*a)) or drawn[-1])
        defense.check(images)
        drawn.clear()
        defense.evidence(images)
    assert [len(sample) for sample in drawn] == [100, 400] * 2
    first, second, other = drawn[0], drawn[1][:100], drawn[2]
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(0)  # independent draws coincide as often as chance says
    fresh = real(family, (6, 7), 100, generator)
    same, chance = ((first == s).flatten(1).all(1).double().mean() if first.ndim > 1 else (first == s).double().mean()
                    for s in (second, fresh))  # fmt: skip
    assert abs(same - chance) < 0.2


def test_numbered_views_are_computed_once_and_give_what_drawing_gives(monkeypatch):
    images = pictures()
    for views in (vw.Columns(2), vw.Blocks(2)):
        once = clear(views)
        assert once.forward_passes((6, 7)) == views.number((6, 7))
        expected = once.evidence(images).values
        monkeypatch.setattr(RandomizedAblation, "_each_once", lambda *_: False)
        assert torch.equal(clear(views).evidence(images).values, expected)
        assert clear(views).forward_passes((6, 7)) == 500
        monkeypatch.undo()
        few = clear(views, samples=3, samples_to_pick=2)  # fewer draws than views
        assert few.forward_passes((6, 7)) == 5
        assert few.evidence(images).values.sum(2).tolist() == [[2, 3]] * 5


def test_sampled_votes_approach_the_shares_of_all_views():
    images = pictures()
    for views in (vw.RandomPixels(2), vw.RandomColumns(2), vw.OneOf(vw.Columns(3))):
        defense = clear(views, samples=20_000)
        sampled = defense.evidence(images).values[:, 1] / 20_000
        exact = exact_shares(defense.model, views, images, (6, 7))
        assert (sampled - exact).abs().max() < 5 * 0.5 / 20_000**0.5
    derandomized = DerandomizedSmoothing(defense.model, vw.Columns(3), None)
    votes = derandomized.evidence(images).values.double().mean(1)
    assert torch.equal(votes, exact)


def test_votes_that_rounding_could_turn_are_not_for_the_class(monkeypatch):
    images = torch.cat([0.1 * pictures(), 0.9 + 0.1 * pictures()])
    sure = clear(vw.RandomPixels(3)).certify(images, PatchThreat(1))
    assert sure.certified.any()
    for tolerance in (0.2, 1.0):
        monkeypatch.setattr(RandomizedAblation, "tolerance", lambda *_, t=tolerance: ev.Tolerance(t, 0.0))
        doubtful = clear(vw.RandomPixels(3)).certify(images, PatchThreat(1))
        assert torch.equal(doubtful.label, sure.label)
        assert (doubtful.margin <= sure.margin).all()
    assert (doubtful.margin == -0.5 - chance_to_touch(42, 3, 1) - ROUNDING).all()


def test_the_certificate_says_with_what_confidence():
    images = 0.9 + 0.1 * pictures()
    cert = clear(vw.OneOf(vw.Columns(2, wrap=False)), alpha=0.01).certify(images, PatchThreat(2))
    assert cert.confidence == 0.99
    assert cert.margin.shape == (5, 5 * 6)
    assert cert.box(7) == (1, 1, 2, 2)
    assert cert.map(0).shape == (6, 7)
    assert cert.margin[0, 0] > cert.margin[0, 2]  # a patch at the border touches fewer bands
    assert cp.RandomizedAblation is RandomizedAblation


def test_models_that_break_the_assumption_are_refused():
    class Coupled(Brightness):
        def forward(self, x):
            return super().forward(x) * (1 + x[:, 0].mean())

    with pytest.raises(InputError, match="model refused"):
        RandomizedAblation(Coupled((6, 7), 0).eval(), vw.RandomPixels(3)).predict(pictures())
    strip = models.StripSettings(widths=(4, 4)).build(vw.Columns(2), 1, 3, (6, 7)).eval()
    assert RandomizedAblation(strip, vw.Columns(2)).forward_passes((6, 7)) == 1
    with pytest.raises(InputError, match="cannot be shown to this network"):
        RandomizedAblation(strip, vw.RandomPixels(3)).predict(pictures())


# from recipes and the command line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    common = {"data": str(folder / "stripes"), "settings": {}, "augment": {}, "learning_rate": 0.01}
    random = common | {
        "defense": "randomized-ablation",
        "objective": {"views_per_step": 2, "patch": 1},
        "settings": {"samples": 200, "samples_to_pick": 50},
        "epochs": 10,
    }
    pixels = {"views": {"name": "random-pixels", "keep": 24}, "model": {"name": "conv", "widths": [8, 16]}}
    write_recipe(folder / "pixels.yaml", **random | pixels)
    columns = {"views": {"name": "random-columns", "keep": 2}, "model": {"name": "resnet18", "widths": [8], "depth": 1}}
    write_recipe(folder / "columns.yaml", **random | columns)
    write_recipe(folder / "bands.yaml", data=str(folder / "stripes"), epochs=4)
    for name in ("pixels", "columns", "bands"):
        train(read(folder / f"{name}.yaml"), folder / name)
    (folder / "good.png").write_bytes(stripes(2, 5)[1][0])
    return folder


@pytest.fixture
def certipatch(monkeypatch, capsys, home):
    monkeypatch.chdir(home)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["certipatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixels", "columns"])
def test_networks_learn_from_random_views(home, name):
    held = json.loads((home / name / "log.jsonl").read_text().splitlines()[-1])
    assert held["clean_accuracy"] > 0.9
    defense, card = open_defense(str(home / name))
    assert isinstance(defense, RandomizedAblation)
    assert card.model_dump(mode="json")["views"].keys() == {"name", "keep"}
    assert defense.settings() == {"samples": 200, "samples_to_pick": 50, "alpha": 0.05, "seed": 0}


BANDS = ("randomized-ablation", "--model", "bands", "--set", "samples=300")


@pytest.mark.parametrize(
    ("defense", "threat"),
    [
        (("pixels",), ("--patch", "1")),
        (("pixels",), ("--sparse", "2")),
        (("columns",), ("--patch", "2", "--count", "2")),
        (BANDS, ("--patch", "1")),
        (BANDS, ("--sparse", "2")),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_evaluate(certipatch, tmp_path, defense, threat):
    command = ("evaluate", "--defense", *defense, "--data", "stripes", "--limit", 6, *threat, "--out", tmp_path / "run")
    code, out, err = certipatch(*command, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["confidence"] == 0.95
    assert "with confidence 0.95" in summary["theorem"]
    assert 0 <= summary["certified_accuracy"] <= summary["clean_accuracy"] <= 1
    assert certipatch(*command, "--json")[:2] == (0, out)
    assert (tmp_path / "run" / "report.html").exists()


def test_something_is_certified_and_stored_counts_say_the_same(certipatch, tmp_path):
    from certipatch.runs.records import read_evidence, read_records, stored_evidence

    command = ("evaluate", "--defense", "randomized-ablation", "--model", "bands", "--data", "stripes", "--patch", 1)
    code, out, _ = certipatch(*command, "--out", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)["certified_accuracy"] > 0.25
    defense, _ = open_defense("randomized-ablation", "bands")
    stored = stored_evidence(read_evidence(tmp_path / "run"), 2, 3, (12, 12))
    assert stored is not None
    found = defense.certificate(stored, PatchThreat(1))
    records = read_records(tmp_path / "run")
    assert found.certified.tolist() == records["certified"].to_pylist()
    assert found.margin.amin(1).tolist() == records["margin"].to_pylist()


def test_certify(certipatch):
    code, out, _ = certipatch("certify", "good.png", "--defense", "pixels", "--patch", "1", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["confidence"] == 0.95
    assert answer["results"][0]["label"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--defense", "derandomized-smoothing", "--model", "pixels"), "random-pixels are for randomized-ablation"),
        (("--defense", "randomized-ablation", "--model", "bands", "--set", "alpha=2"), "alpha"),
        (("--defense", "randomized-ablation", "--model", "bands", "--set", "samples=0"), "samples"),
        (("--defense", "randomized-ablation"), "--model"),
    ],
)
def test_bad_commands_are_told_in_one_line(certipatch, arguments, message):
    code, out, err = certipatch("certify", "good.png", *arguments, "--patch", "1")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("views.keep=0", "views.keep"),
        ("views.keep=145", "cannot keep 145 of the 144"),
        ("views.width=3", "described by their keep"),
        ("views={name: random-pixels}", "need a keep"),
        ("views={name: columns}", "need a width"),
        ("views={name: columns, width: 2, keep: 3}", "described by their width"),
        ("views_per_step", "key=value"),
        ("objective.views_per_step=all", "cannot all be shown"),
        ("defense=patchguard", "random-pixels are for randomized-ablation"),
        ("model.name=strip", "reads columns, rows or blocks"),
    ],
)
def test_bad_recipes_are_told_in_one_line(home, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        train(read(home / "pixels.yaml", [change, "settings={}"]), tmp_path / "out")
    assert "\n" not in str(error.value)
