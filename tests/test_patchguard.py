"""PatchGuard and what it generalises, end to end: tiny networks of local logits and of bands, pasted patches."""

import json
import math
import sys

import pytest
import torch
from support import write_parquet, write_recipe
from torch import nn

import certipatch as cp
from certipatch import cli
from certipatch import evidence as ev
from certipatch import views as vw
from certipatch.defenses import BagCert, ClippedBagNet, PatchGuard, PatchGuardPlusPlus, Undefended
from certipatch.defenses.patchguard import malicious_windows
from certipatch.errors import InputError
from certipatch.models import ConvSettings, SmallBagNet, StripSettings
from certipatch.saved import open_defense
from certipatch.testing import check_defense
from certipatch.threats import PatchThreat, SparseThreat
from certipatch.views.incidence import sees

SIZE = (12, 14)
BUILT = PatchThreat(2)


def pictures(number=6):
    """Pictures from flat to noisy, so that views agree on some and not on others."""
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(number, 1, 1, 1, generator=generator)
    noise = torch.rand(number, 1, *SIZE, generator=generator)
    return base + (noise - base) * torch.linspace(0, 0.6, number).view(-1, 1, 1, 1)


def confident(network, views):
    """The network with answers that differ from picture to picture."""
    network.eval().requires_grad_(False)
    strips = getattr(network, "strips", [network])
    lasts = [network.local[-1]] if hasattr(network, "local") else [one.head for one in strips]
    answers = ev.logits(network, views or cp.receptive_fields(network, SIZE), pictures())
    mean, spread = answers.mean((0, 1)), answers.std((0, 1))
    for last in lasts:
        factor = (3 / spread).view(-1, *[1] * (last.weight.ndim - 1))
        last.weight.copy_(last.weight * factor)
        last.bias.copy_((last.bias - mean) * 3 / spread)
    return network


def bagnet():
    torch.manual_seed(0)
    return confident(SmallBagNet(1, 3, SIZE, 10, (4, 6, 8, 8)), None)


def strip(views):
    torch.manual_seed(1)
    network = StripSettings(widths=(8, 16), depth=1).build(views, 1, 3, SIZE)
    return confident(network, views)


def cross():
    """Columns and rows, each of whose views speak for few classes."""
    network = strip(CROSS)
    for one in network.strips:
        one.head.bias.sub_(8)
    return network


COLUMNS, CROSS = vw.Columns(2), vw.Cross(2)
DEFENSES = {
    "Mask-BN logits": lambda: PatchGuard(bagnet(), BUILT),
    "Mask-BN clipped": lambda: PatchGuard(bagnet(), BUILT, clip=4.0),
    "Mask-BN T=0.3": lambda: PatchGuard(bagnet(), BUILT, score_type="confidence", threshold=0.3, clip=1.0),
    "Mask-DS": lambda: PatchGuard(strip(COLUMNS), BUILT, COLUMNS),
    "Mask-DS predictions": lambda: PatchGuard(strip(COLUMNS), BUILT, COLUMNS, score_type="prediction"),
    "Mask-DS strided": lambda: PatchGuard(strip(vw.Columns(3, 4)), BUILT, vw.Columns(3, 4)),
    "Mask-DS rows": lambda: PatchGuard(strip(vw.Rows(2, wrap=False)), BUILT, vw.Rows(2, wrap=False)),
    "Mask-DS blocks": lambda: PatchGuard(strip(vw.Blocks(4, 2)), BUILT, vw.Blocks(4, 2)),
    "Mask-DS cross": lambda: PatchGuard(cross(), BUILT, CROSS, score_type="sigmoid", ignore_threat=True),
    "clipped BagNet": lambda: ClippedBagNet(bagnet(), scale=1.0, shift=0.0),
    "clipped DS": lambda: ClippedBagNet(strip(COLUMNS), COLUMNS, scale=1.0, shift=0.0),
    "BagCert": lambda: BagCert(bagnet(), threshold=0.5),
    "BagCert DS": lambda: BagCert(strip(COLUMNS), COLUMNS, threshold=0.5),
    "PatchGuard++": lambda: PatchGuardPlusPlus(bagnet(), BUILT, threshold=0.4),
    "PatchGuard++ DS": lambda: PatchGuardPlusPlus(strip(COLUMNS), BUILT, COLUMNS, threshold=0.4),
}


@pytest.mark.slow
@pytest.mark.parametrize("threat", [BUILT, PatchThreat(1), PatchThreat((1, 2))], ids=str)
@pytest.mark.parametrize("make", DEFENSES.values(), ids=DEFENSES)
def test_no_patch_breaks_a_certificate(make, threat):
    tried = check_defense(make(), pictures(), threat, trials=12, seed=1, slack=2.0)
    assert tried.attacks >= 8 * tried.attacked > 0


@pytest.mark.parametrize("make", [DEFENSES[n] for n in ("Mask-BN logits", "Mask-DS", "clipped BagNet", "BagCert")])
def test_other_threats_keep_the_label(make):
    defense = make()
    label = defense.predict(pictures())
    for threat in (PatchThreat(5), PatchThreat(1, count=2), SparseThreat(2), PatchThreat(2, where="corners")):
        assert torch.equal(defense.certify(pictures(), threat).label, label)


def test_windows_are_what_a_patch_can_reach():
    network = bagnet()
    fields = cp.receptive_fields(network, SIZE)
    windows = malicious_windows(fields, BUILT, SIZE)
    rows = sees(fields, BUILT, SIZE).rows
    assert ((rows[:, None] & ~windows.members).sum(2) == 0).any(1).all()  # every place lies in one
    circular = malicious_windows(COLUMNS, BUILT, SIZE)
    assert len(circular) == 13  # places of a 2-wide patch; no patch wraps
    assert circular.members.sum(1).unique().tolist() == [3]
    assert len(malicious_windows(vw.Columns(2, count=2), BUILT, SIZE)) == 13  # a list where they are no boxes


def test_a_cross_shows_columns_and_rows():
    visible = CROSS.visible(SIZE)
    assert torch.equal(visible, torch.cat([vw.Columns(2).visible(SIZE), vw.Rows(2).visible(SIZE)]))
    assert torch.equal(CROSS.visible(SIZE, torch.tensor([3, 20])), visible[[3, 20]])
    assert vw.create(CROSS.settings()) == CROSS
    assert sees(CROSS, BUILT, SIZE).sizes.unique().tolist() == [6]
    with pytest.raises(InputError, match="one band"):
        vw.Cross(2, count=2)


def test_fixed_windows_give_a_largest_patch():
    network, images = cross(), pictures(20)
    fixed = PatchGuard(network, BUILT, CROSS, score_type="sigmoid", ignore_threat=True)
    largest = fixed.largest_patch(fixed.evidence(images))
    for side in (1, 2, 3, 4):
        assert torch.equal(fixed.certify(images, PatchThreat(side)).certified, largest >= side)
    assert largest.max() >= 1
    free = PatchGuard(network, BUILT, CROSS, score_type="sigmoid")
    assert free.largest_patch(free.evidence(images)) is None


def test_masking_certifies_more_than_voting_where_evidence_spreads():
    """On evidence in [0, 1] and windows that match, what the mask takes is at most what an attacker could add."""
    network, images = strip(COLUMNS), pictures()
    masked = PatchGuard(network, BUILT, COLUMNS).certify(images, BUILT)
    confidence = ev.scores(ev.logits(network, COLUMNS, images))
    summed = cp.rules.ClippedSum(0.0, 1.0).certify(confidence, sees(COLUMNS, BUILT, SIZE).rows)
    assert torch.equal(masked.label, summed.label) or masked.certified.sum() > summed.certified.sum()
    assert (
        masked.margin.amin(1)[masked.label == summed.label]
        >= summed.margin.amin(1)[masked.label == summed.label] - 1e-3
    ).all()


def test_detection_raises_alarms_and_counts_them():
    defense = PatchGuardPlusPlus(bagnet(), BUILT, threshold=0.1)
    cert = defense.certify(pictures(20), BUILT)
    assert cert.notion == "detection"
    assert cert.alarm is not None
    assert cert.alarm.any()
    assert not (cert.certified & cert.alarm).any()


def test_logits_are_checked_without_centring():
    """An offset of all classes that hidden pixels move is invisible to softmax, and an attack on a sum of logits."""

    class Leaks(nn.Module):
        encoding = "all-views"

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x):
            bands = torch.stack([x[..., i : i + 2].mean((1, 2, 3)) for i in range(13)], 1)
            return bands[..., None] * torch.tensor([1.0, -1.0]) * self.scale + x.mean((1, 2, 3))[:, None, None]

    views = vw.Columns(2, wrap=False)
    assert PatchGuard(Leaks().eval(), BUILT, views, score_type="confidence").certify(pictures(), BUILT) is not None
    for defense in (
        PatchGuard(Leaks().eval(), BUILT, views, score_type="logits"),
        ClippedBagNet(Leaks().eval(), views),
        PatchGuardPlusPlus(Leaks().eval(), BUILT, views),
    ):
        with pytest.raises(InputError, match="refused"):
            defense.certify(pictures(), BUILT)


def test_settings_that_do_not_fit():
    for make in (
        lambda: PatchGuard(bagnet(), SparseThreat(2)),
        lambda: PatchGuardPlusPlus(bagnet(), SparseThreat(2)),
        lambda: PatchGuard(bagnet(), BUILT, score_type="votes"),
        lambda: PatchGuard(bagnet(), BUILT, threshold=2.0),
        lambda: PatchGuard(bagnet(), BUILT, clip=-1.0),
        lambda: ClippedBagNet(bagnet(), scale=0),
        lambda: BagCert(bagnet(), threshold=1.0),
        lambda: PatchGuardPlusPlus(bagnet(), BUILT, threshold=1.0).certify(pictures(), BUILT),
        lambda: PatchGuard(bagnet(), BUILT, batch_size=0),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            make().predict(pictures())


def test_undefended_certifies_nothing():
    torch.manual_seed(0)
    network = ConvSettings(widths=(8, 8)).build(None, 1, 3, SIZE).eval()
    defense = Undefended(network)
    cert = defense.certify(pictures(), BUILT)
    assert (cert.margin == -math.inf).all()
    assert cert.margin.shape == (6, 11 * 13)
    assert torch.equal(cert.label, defense.predict(pictures()))
    assert defense.certify(pictures(), SparseThreat(3)).margin.shape == (6, 1)


# From the command line -------------------------------------------------------------------------------------------


def main(arguments):
    """Exit code of a command."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["certipatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code or 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three trained defenses: a BagNet, columns and a plain network, on tiny pictures."""
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes", size=(14, 12))
    bag = {
        "model": {"name": "small-bagnet", "receptive_field": 10, "widths": [4, 6, 8, 8]},
        "views": None,
        "defense": "patchguard",
    }
    bag["settings"] = {"score_type": "confidence", "patch": 2}
    bag["objective"] = {"views_per_step": "all", "cross_entropy_weight": 0.5, "mask_margin_weight": 1.0,
                        "masked_cross_entropy_weight": 0.2, "pooled_cross_entropy_weight": 0.5, "patch": 2}  # fmt: skip
    plain = {"model": {"name": "conv", "widths": [8, 8]}, "views": None, "defense": "undefended", "objective": {}}
    for name, changes in (("bag", bag), ("columns", {}), ("plain", plain)):
        recipe = write_recipe(folder / f"{name}.yaml", name=name, epochs=12, **changes)
        assert main(["train", str(recipe), "--data", str(folder / "stripes"), "--out", str(folder / name)]) == 0
    return folder


def evaluate(home, out, *options):
    return main(["evaluate", "--data", str(home / "stripes"), "--out", str(out), *map(str, options)])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bag", "columns"])
@pytest.mark.parametrize("method", ["patchguard", "clipped-bagnet", "bagcert", "patchguard-plus-plus", None])
def test_every_method_around_every_network(home, tmp_path, method, model):
    around = ["--defense", home / model] if method is None else ["--defense", method, "--model", home / model]
    assert evaluate(home, tmp_path / "run", *around, "--patch", 2) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"] == 40
    assert 0 <= summary["certified_accuracy"] <= summary["clean_accuracy"] <= 1
    assert summary["defense"] == (model if method is None else f"{method}:{model}")
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert ("certified_by_patch" in summary) == (
        method in ("clipped-bagnet", "bagcert") or (model, method) == ("columns", None)
    )
    before = (tmp_path / "run" / "summary.json").read_bytes()
    assert evaluate(home, tmp_path / "run", *around, "--patch", 2) == 0
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_training_raises_the_margin(home):
    defense, card = open_defense(str(home / "bag"))
    assert card.defense == "patchguard"
    assert isinstance(defense, PatchGuard)
    lines = [json.loads(line) for line in (home / "bag" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["clean_accuracy"] > 0.5


@pytest.mark.slow
def test_plain_networks_run_too(home, tmp_path, capsys):
    assert evaluate(home, tmp_path / "run", "--defense", home / "plain", "--patch", 2) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["certified_accuracy"] == 0
    assert summary["clean_accuracy"] > 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--defense", "patchguard", "--patch", 2], "--model"),
        (["--defense", "patchgard", "--model", "bag", "--patch", 2], "did you mean 'patchguard'"),
        (["--defense", "patchguard", "--model", "bog", "--patch", 2], "unknown model"),
        (["--defense", "patchguard", "--model", "bag", "--patch", 2, "--set", "threshold=3"], "threshold"),
        (["--defense", "patchguard", "--model", "bag", "--patch", 2, "--set", "treshold=0.3"], "treshold"),
        (["--defense", "patchguard", "--model", "bag", "--patch", 2, "--set", "threshold"], "key=value"),
        (["--defense", "patchguard", "--model", "plain", "--patch", 2], "needs views"),
        (["--defense", "undefended", "--model", "bag", "--patch", 2], "undefended"),
        (["--defense", "derandomized-smoothing", "--model", "bag", "--patch", 20], "does not fit"),
    ],
)
def test_bad_combinations_say_what_is_wrong(home, tmp_path, capsys, options, message):
    options = [str(home / option) if option in ("bag", "plain") else option for option in options]
    assert evaluate(home, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_settings_of_a_defense_are_part_of_a_run(home, tmp_path, capsys):
    around = ["--defense", "patchguard", "--model", home / "bag", "--patch", 2]
    assert evaluate(home, tmp_path / "run", *around, "--set", "threshold=0.5") == 0
    assert "threshold: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
    assert evaluate(home, tmp_path / "run", *around) == 2
    assert "holds another run: settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"views_per_step": 2}}, "all of them at once"),
        ({"views": {"name": "columns", "width": 2}, "objective": {"views_per_step": "all"}}, "leave views out"),
        ({"defense": "undefended", "objective": {"views_per_step": "all"}}, "undefended"),
        ({"settings": {"threshold": 7}, "objective": {"views_per_step": "all"}}, "threshold"),
        ({"objective": {"views_per_step": "all", "cross_entropy_weight": 0}}, "nothing would be trained"),
        ({"objective": {"views_per_step": 3, "vote_margin_weight": 1}}, "vote_margin_weight needs"),
        (
            {"model": {"name": "small-bagnet", "receptive_field": 11}, "objective": {"views_per_step": "all"}},
            "10 or 12",
        ),
        ({"model": {"name": "small-bagnet", "depth": 2}, "objective": {"views_per_step": "all"}}, "depth"),
    ],
)
def test_recipes_that_do_not_fit(home, tmp_path, capsys, changes, message):
    base = {
        "model": {"name": "small-bagnet", "receptive_field": 10},
        "views": None,
        "defense": "patchguard",
        "settings": {},
    }
    recipe = write_recipe(tmp_path / "r.yaml", **(base | changes))
    assert main(["train", str(recipe), "--data", str(home / "stripes"), "--out", str(tmp_path / "m")]) == 2
    assert message in capsys.readouterr().err
