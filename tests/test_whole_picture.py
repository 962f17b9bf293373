"""Double masking where the whole picture's answer takes the majority's place: reference, attacks, refusals."""

import re

import pytest
import torch
from test_patchcleanser import SIZE, THREAT, full_table, pictures
from torch import nn
from torch.nn import functional as F

import certipatch as cp
from certipatch import evidence as ev
from certipatch import rules
from certipatch.defenses import METHODS
from certipatch.defenses.settings import DoubleMaskingSettings
from certipatch.errors import InputError
from certipatch.models import CascadeSettings, ConvSettings, FallbackEnsemble, FallbackEnsembleSettings, NullToFill
from certipatch.models.adapters.adapted import Adapted, Preprocessing
from certipatch.rules.soft import lead_of
from certipatch.saved import Card
from certipatch.testing import check_defense
from certipatch.training.recipe import Recipe
from certipatch.training.start import start_from
from certipatch.views import MaskPairs, mask_set
from certipatch.views import create as create_views

CONV = {"name": "conv", "widths": (8, 8)}
NULL = CONV | {"encoding": "null"}


class Brightest(nn.Module):
    """Which third of the picture is brightest, with a weakness for one of them; masks are black."""

    encoding, fill = "picture", 0.0

    def __init__(self, weakness: int = 0):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.eye(3)[weakness], requires_grad=False)

    def forward(self, x):
        return 40 * (F.adaptive_avg_pool2d(x.mean(1, keepdim=True), (3, 1)).flatten(1) + self.weight)


def fallback_ensemble() -> FallbackEnsemble:
    """Two networks that see things differently."""
    return FallbackEnsemble([Brightest(), Brightest(2)]).eval()


def several() -> torch.Tensor:
    """One bright third each, less and less clearly; and others with a spot in two of them, each of which a mask can hide."""
    generator = torch.Generator().manual_seed(3)
    unclear = torch.rand(15, 2, *SIZE, generator=generator) * 0.05
    for i, picture in enumerate(unclear):
        for k in {0, 1, 2} - {i % 3}:
            place = 4 * k + 1, 1 if k == (i + 1) % 3 else 9
            picture[:, place[0] : place[0] + 2, place[1] : place[1] + 2] = 0.9 + 0.1 * torch.rand(
                (), generator=generator
            )
    return torch.cat([pictures(), unclear])


@pytest.mark.parametrize("all_margins", [True, False])
@pytest.mark.parametrize("gap", [0.0, 0.3])
@pytest.mark.parametrize("network", [Brightest().eval(), fallback_ensemble()], ids=["one", "two"])
def test_the_full_table_says_the_same(network, gap, all_margins):
    x = several()
    defense = cp.PatchCleanser(network, THREAT, masks=3, min_mean_gap=gap, all_margins=all_margins, fallback="unmasked")
    evidence = defense.evidence(x)
    found = defense.certificate(evidence, THREAT)
    whole = ev.scores(getattr(network, "unmasked", network)(x))
    table = torch.cat([full_table(defense, x), whole[:, None]], 1)
    relation = defense.relation(THREAT, SIZE)
    assert relation.rows[:, -1].all()  # the attacker has the whole picture wherever the patch lies
    full = rules.DoubleMask(gap, "unmasked").certify(table, relation.rows, error=evidence.error)
    assert torch.equal(found.label, full.label)
    assert torch.equal(defense.predict(x), full.label)
    assert torch.equal(found.certified, full.certified)
    paper = cp.PatchCleanser(network, THREAT, masks=3, min_mean_gap=gap, all_margins=all_margins).certify(x, THREAT)
    assert torch.equal(found.certified, paper.certified)
    assert torch.equal(found.label[paper.certified], paper.label[paper.certified])
    assert (found.label != paper.label).any()
    assert torch.equal(evidence.passes, (~evidence.unsure).sum(1))
    assert (evidence.passes <= defense.forward_passes(SIZE)).all()


def test_finer_masks_know_nothing_of_it():
    x, network = several(), fallback_ensemble()
    given = {"masks": 2, "subdivisions": 2, "exit_gap": 0.3}
    defense = cp.PatchCleanser(network, THREAT, **given, fallback="unmasked")
    found, paper = defense.certify(x, THREAT), cp.PatchCleanser(network, THREAT, **given).certify(x, THREAT)
    assert torch.equal(found.certified, paper.certified)
    assert torch.equal(found.margin[paper.certified] > 0, paper.margin[paper.certified] > 0)
    assert torch.equal(defense.predict(x), found.label)
    no_mask_wins = (found.margin <= 0).all(1)
    assert no_mask_wins.any()
    assert torch.equal(found.label[no_mask_wins], network.unmasked(x).argmax(1)[no_mask_wins])


@pytest.mark.slow
@pytest.mark.parametrize("subdivisions", [None, 2])
def test_certificates_hold_against_pasted_patches(subdivisions):
    defense = cp.PatchCleanser(
        fallback_ensemble(), THREAT, masks=3, subdivisions=subdivisions, exit_gap=0.3, fallback="unmasked"
    )
    tried = check_defense(defense, several(), THREAT, slack=1e-5, trials=8)
    assert tried.certified > 50
    assert tried.changed > 10


class Says(nn.Module):
    """One class, whatever it sees."""

    encoding, fill = "picture", 0.0

    def __init__(self, label: int = 0, classes: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(classes)[label], requires_grad=False)

    def forward(self, x):
        return self.weight.expand(len(x), -1)


def test_certificates_do_not_depend_on_the_whole_picture():
    """Whatever an attacker makes of it: certified labels stay, and others follow it."""
    x, network, answers = several(), Brightest().eval(), []
    for label in range(3):
        network.unmasked = Says(label)
        answers.append(cp.PatchCleanser(network, THREAT, masks=6, fallback="unmasked").certify(x, THREAT))
    certified, labels = answers[0].margin > 0, torch.stack([one.label for one in answers])
    assert all(torch.equal(one.margin > 0, certified) for one in answers)
    wins = certified.any(1)
    assert 3 < wins.sum() < len(x) - 3
    assert (labels[:, wins] == labels[0, wins]).all()
    assert (labels[:, ~wins] == torch.arange(3)[:, None]).all()


@pytest.mark.slow
def test_a_model_may_bring_its_own():
    """As an attribute, also behind a preprocessing; without ``fallback="unmasked"`` nobody looks at it."""
    x, network = torch.cat([several(), several()[:, :1]], 1), Brightest().eval()
    network.unmasked = Says(2)
    found = cp.PatchCleanser(network, THREAT, masks=3, fallback="unmasked").certify(x, THREAT)
    asked = Adapted(network, Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3), "mine").eval()
    assert torch.equal(
        cp.PatchCleanser(asked, THREAT, masks=3, fill=0.0, fallback="unmasked").certify(x, THREAT).label, found.label
    )
    assert (found.label[(found.margin <= 0).all(1)] == 2).all()
    network.unmasked = Says(2, classes=5)
    cp.PatchCleanser(network, THREAT, masks=3).certify(x, THREAT)
    with pytest.raises(InputError, match="whole pictures with 5 classes, masked ones with 3"):
        cp.PatchCleanser(network, THREAT, masks=3, fallback="unmasked").predict(x)
    network.unmasked = nn.Sequential(nn.BatchNorm2d(3), Brightest()).train()
    with pytest.raises(InputError, match="train"):
        cp.PatchCleanser(network, THREAT, masks=3, fallback="unmasked").predict(x)
    network.unmasked = Says(2).double()
    assert torch.equal(cp.PatchCleanser(network, THREAT, masks=3, fallback="unmasked").predict(x), found.label)


def test_attacks_go_through_the_whole_picture():
    x = pictures(4).requires_grad_()
    network = fallback_ensemble()
    defense = cp.PatchCleanser(network, THREAT, masks=3, fallback="unmasked")
    leads = defense.leads(x, torch.Generator().manual_seed(0))
    assert leads.shape == (4, 3)
    paper = cp.PatchCleanser(network, THREAT, masks=3).leads(x, torch.Generator().manual_seed(0))
    assert not torch.allclose(leads, paper)
    plain = defense.network_leads(x)
    torch.testing.assert_close(plain, lead_of(network.unmasked(x)))
    evidence = torch.tensor([[[0.9, 0.1]] * 3 + [[0.2, 0.8]], [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.2, 0.8]]])
    found = rules.DoubleMask(fallback="unmasked").leads(evidence)
    assert torch.equal(found.argmax(1), rules.DoubleMask(fallback="unmasked").predict(evidence))


def test_views():
    views = MaskPairs(mask_set([THREAT], SIZE, (2, 2)), unmasked=True)
    assert views.number(SIZE) == 11
    assert views.visible(SIZE)[-1].all()
    assert torch.equal(views.visible(SIZE)[:-1], MaskPairs(views.masks).visible(SIZE))
    again = create_views(views.settings())
    assert torch.equal(again.visible(SIZE), views.visible(SIZE))


def test_a_fallback_ensemble_starts_from_networks_that_were_trained_one_by_one(tmp_path):
    from certipatch.saved import card as cards
    from certipatch.saved.weights import save_weights

    masked = {"name": "cascade", "members": (NULL, CONV), "flip_tta": True}
    made = FallbackEnsembleSettings(members=(masked, CONV)).build(None, 3, 4, SIZE).eval()
    single = [ConvSettings(**one).build(None, 3, 4, SIZE).eval() for one in (NULL, CONV, CONV)]
    for i, (network, of) in enumerate(zip(single, (NULL, CONV, CONV), strict=True)):
        (folder := tmp_path / str(i)).mkdir()
        sha = save_weights(folder, network, "float32")
        cards.write(folder, Card(name=str(i), defense="undefended", model=of, image_size=SIZE, channels=3,
                                 classes=tuple("abcd"), sha256=sha))  # fmt: skip
    start_from(tuple(str(tmp_path / str(i)) for i in range(3)), made, tuple("abcd"))
    x = torch.rand(5, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    encoded = torch.cat([x, 1 - x], 1)
    assert isinstance(made.parts[1], NullToFill)
    with torch.inference_mode():
        turned = torch.cat([x.flip(3), 1 - x.flip(3)], 1)
        said = [single[0](encoded), single[0](turned), *(net(way) for net in single[1:] for way in (x, x.flip(3)))]
        torch.testing.assert_close(made.unmasked(encoded), torch.stack(said).mean(0))
        cascade = made.parts[0]
        torch.testing.assert_close(cascade.parts[0](encoded), single[0](encoded))
        torch.testing.assert_close(cascade.parts[1](encoded), single[1](x))
        torch.testing.assert_close(made(encoded), cascade(encoded))
    with pytest.raises(InputError, match="3 parts, but 2 models"):
        start_from((str(tmp_path / "0"), str(tmp_path / "1")), made, tuple("abcd"))


def test_refusals_and_settings():
    network = Brightest().eval()
    with pytest.raises(InputError, match="fallback is majority or unmasked, not True"):
        cp.PatchCleanser(network, THREAT, fallback=True)
    assert cp.PatchCleanser(network, THREAT, fallback="unmasked").settings()["fallback"] == "unmasked"
    with pytest.raises(InputError, match="at least two networks"):
        FallbackEnsemble([network])
    with pytest.raises(ValueError, match="the cascade cannot have fallback-ensemble as a member"):
        CascadeSettings(members=(CONV, {"name": "fallback-ensemble", "members": (CONV, CONV)}))
    two = {"name": "fallback-ensemble", "members": (CONV, CONV)}
    told = {"name": "mine", "data": "cifar10", "model": two, "defense": "patchcleanser"}
    with pytest.raises(ValueError, match="members of a fallback-ensemble are trained one by one"):
        Recipe(**told, settings={"fallback": "unmasked"}, epochs=3)
    assert "fallback" not in cp.PatchCleanser(network, THREAT).settings()


@pytest.mark.parametrize(("old", "new"), DoubleMaskingSettings.renamed.items())
def test_an_earlier_name_of_a_setting_is_refused_with_its_new_one(old, new):
    """Settings that PatchCURE never had are unknown to it."""
    for defense in ("patchcleanser", "patchcure"):
        settings = METHODS[defense].settings_class
        known = new.partition(":")[0] in settings.model_fields
        message = f"{old} has a new name: use {re.escape(new)}" if known else "Extra inputs"
        with pytest.raises(ValueError, match=message):
            settings.model_validate({old: 0.5})


@pytest.mark.parametrize("defense", ["patchguard", "dw"])
def test_an_earlier_name_of_a_setting_of_other_defenses_is_refused_too(defense):
    settings = METHODS[defense].settings_class
    for old, new in settings.renamed.items():
        assert new in settings.model_fields
        with pytest.raises(ValueError, match=f"{old} has a new name: use {new}"):
            settings.model_validate({old: 0.5})
