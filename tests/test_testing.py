"""The soundness kit finds what is wrong: one broken rule or defense per trap."""

import subprocess
import sys

import pytest
import torch

from certipatch.certificate import Certificate
from certipatch.defenses.base import Defense, Evidence
from certipatch.rules import Rule, Verdict, Vote
from certipatch.testing import Report, check_defense, check_rule, extremes, random_relation, random_votes
from certipatch.threats import PatchThreat, SparseThreat


class Broken(Rule):
    """Vote, with hooks to break it."""

    theorem = "broken"

    def predict(self, evidence):
        return Vote().predict(evidence)

    def certify(self, evidence, sees, unsure=None):
        verdict = Vote().certify(evidence, sees, unsure)
        return Verdict(verdict.label, self.margin(verdict, evidence, sees, unsure))

    def margin(self, verdict, evidence, sees, unsure):
        return verdict.margin


class TieAlwaysWon(Broken):
    def margin(self, verdict, *_):
        return verdict.margin + (verdict.label > 0)[:, None]


class OffByOne(Broken):
    def margin(self, verdict, *_):
        return verdict.margin + 1


class IgnoresDoubt(Broken):
    def margin(self, verdict, evidence, sees, unsure):
        return Vote().certify(evidence, sees).margin


class RunnerUpOnly(Broken):
    def margin(self, verdict, evidence, sees, unsure):
        counts = evidence.sum(1, dtype=torch.int64).scatter(1, verdict.label[:, None], -1)
        keep = torch.stack([verdict.label, counts.argmax(1)], 1)
        two = evidence.gather(2, keep.sort(1).values[:, None].expand(-1, evidence.shape[1], -1))
        return Vote().certify(two, sees, unsure).margin


class CountsOnlyOnce(Broken):
    """Forgets that an attacked view can vote for the rival: |A| instead of 2|A| below the clean counts."""

    def margin(self, verdict, evidence, sees, unsure):
        counts = evidence.sum(1, dtype=torch.int64)
        lead = counts.gather(1, verdict.label[:, None]) - counts.scatter(1, verdict.label[:, None], -1).amax(
            1, keepdim=True
        )
        return (lead - sees.sum(1)).double()


class FlatWindows(Broken):
    """Takes circular windows for flat ones: the view after the end is not counted."""

    def margin(self, verdict, evidence, sees, unsure):
        flat = sees.clone()
        flat[:, 0] &= ~sees[:, -1] | sees.all(1)
        return Vote().certify(evidence, flat, unsure).margin


class Shy(Broken):
    def margin(self, verdict, *_):
        return verdict.margin - 1


class Never(Broken):
    def margin(self, verdict, *_):
        return torch.full_like(verdict.margin, -torch.inf)


class Single(Broken):
    def margin(self, verdict, *_):
        return verdict.margin.float()


class Misshapen(Broken):
    def margin(self, verdict, *_):
        return verdict.margin.amin(1, keepdim=True).repeat(1, verdict.margin.shape[1] + 1)


class Grows(Broken):
    def margin(self, verdict, evidence, sees, unsure):
        return torch.where(verdict.margin > 0, 1.0 + sees.sum(1), verdict.margin)


class Coupled(Broken):
    def margin(self, verdict, *_):
        return verdict.margin - float(len(verdict.label) > 1)


class Overwrites(Broken):
    def margin(self, verdict, evidence, sees, unsure):
        evidence[:, 0] = 0
        return verdict.margin


class TwoTieRules(Broken):
    def predict(self, evidence):
        counts = evidence.sum(1, dtype=torch.int64)
        return counts.shape[1] - 1 - counts.flip(1).argmax(1)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (TieAlwaysWon(), "attacked"),
        (OffByOne(), "attacked"),
        (IgnoresDoubt(), "attacked"),
        (RunnerUpOnly(), "attacked"),
        (CountsOnlyOnce(), "attacked"),
        (FlatWindows(), "attacked|margins grow"),
        (Shy(), "not exact"),
        (Vote(margin="paper"), "not exact"),
        (Single(), "float32"),
        (Misshapen(), "margin"),
        (Grows(), "margins grow"),
        (Coupled(), "in a batch"),
        (Overwrites(), "changed the caller's"),
        (TwoTieRules(), "but predict"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_broken_rules_are_found(rule, reason):
    with pytest.raises(AssertionError, match=reason):
        check_rule(rule, views=5, classes=3, exact=True)


@pytest.mark.slow
def test_a_kit_that_tried_nothing_says_so():
    with pytest.raises(AssertionError, match="nothing was tried"):
        check_rule(Never(), views=5, classes=3)
    with pytest.raises(AssertionError, match="nothing was tried"):
        check_rule(Vote(), views=5, classes=2, trials=0)


def test_the_counterexample_is_in_the_message():
    with pytest.raises(
        AssertionError,
        match=r"(?s)label \d, margin \d+, views \[.*\] attacked: label \d\nattacked = \[\[.*evidence = \[\[",
    ):
        check_rule(OffByOne(), views=3, classes=2)


class ClippedSum(Rule):
    """Scores in [0, 1], summed: a rule over reals."""

    theorem = "Σ_out e_y > Σ_out e_k + |A|"

    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def predict(self, evidence):
        return evidence.double().sum(1).argmax(1)

    def certify(self, evidence, sees, unsure=None):
        label = self.predict(evidence)
        doubt = torch.zeros(evidence.shape[:2]).bool() if unsure is None else unsure
        owned = sees[None] | doubt[:, None]
        out = (evidence.double()[:, None] * ~owned[..., None]).sum(2)
        rivals = out.scatter(2, label[:, None, None].expand(-1, len(sees), 1), -torch.inf).amax(2)
        lead = out.gather(2, label[:, None, None].expand(-1, len(sees), 1))[..., 0] - rivals
        return Verdict(label, lead - owned.sum(2) + self.bonus)


def scores(generator, sees, classes):
    favourite = torch.eye(classes)[torch.randint(classes, (6, 1), generator=generator)]
    return (torch.rand(6, sees.shape[1], classes, generator=generator) * 0.5 + favourite * 0.5).half().double()


@pytest.mark.slow
def test_rules_over_reals():
    tried = check_rule(ClippedSum(), views=6, classes=3, evidence=scores, slack=1e-12)
    assert tried.certified > 0
    with pytest.raises(AssertionError, match="attacked"):
        check_rule(ClippedSum(0.6), views=6, classes=3, evidence=scores, slack=1e-12)


def test_attacks_must_stay_in_their_views():
    with pytest.raises(ValueError, match="does not own"):
        check_rule(Vote(), views=3, classes=2, attacks=lambda generator, evidence, owned: 1 - evidence[None].int())


def test_the_adversary_is_exhaustive_where_it_can_be():
    evidence, owned = torch.zeros(4, 2), torch.tensor([True, False, True, False])
    attacked = extremes()(torch.Generator(), evidence, owned)
    assert len(attacked.unique(dim=0)) == 2**4
    assert (attacked[:, ~owned] == 0).all()
    big = extremes(-1.0, 3.0, budget=10)(torch.Generator(), evidence, owned)
    assert sorted(big[:, owned].unique().tolist()) == [-1, 3]
    alone = torch.tensor([[-1.0, 3.0]]).expand(2, -1)
    assert (big[:, owned] == alone).all(2).all(1).any()  # the worst case for votes is always among them
    nothing = extremes()(torch.Generator(), evidence, owned & False)
    assert torch.equal(nothing, evidence[None])


def test_relations_and_votes_hold_what_they_promise():
    generator = torch.Generator().manual_seed(0)
    rows = [random_relation(generator, 5, kind) for kind in range(64)]
    every = torch.cat(rows)
    assert not every.any(1).all()  # an empty row
    assert every.all(1).any()
    assert (every[:, 0] & every[:, 4] & ~every[:, 2]).any()  # around the end
    ties = limits = 0
    for relation in rows:
        votes = random_votes(generator, relation, 3)
        assert ((votes == 0) | (votes == 1)).all()
        counts = votes.sum(1, dtype=torch.int64).sort(1, descending=True).values
        ties += int((counts[:, 0] == counts[:, 1]).sum())
        margin = Vote().certify(votes, relation).margin
        limits += int(((margin == 0) | (margin == 1)).any(1).sum())
    assert ties > 100
    assert limits > 200


@pytest.mark.slow
def test_reports_and_no_pytest():
    assert isinstance(check_rule(Vote(), views=2, classes=2, trials=16), Report)
    code = "import sys, certipatch.testing; assert not {'pytest', 'hypothesis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class Brightest(Defense):
    """Votes of single columns: 1 where the column's mean exceeds a half. ``gift`` makes its margins wrong."""

    name = "brightest"

    def __init__(self, **broken):
        self.broken = broken

    def evidence(self, images):
        if self.broken.get("overwrite"):
            images.mul_(0.5)
        mean = images.mean((1, 2))
        bright = mean > (mean.mean() if self.broken.get("coupled") else 0.5)
        return Evidence(torch.stack([~bright, bright], 2), None, tuple(images.shape[2:]))

    def label(self, evidence):
        label = Vote().predict(evidence.values)
        return 1 - label if self.broken.get("predict") else label

    def certificate(self, evidence, threat):
        from certipatch import views
        from certipatch.views.incidence import sees

        relation = sees(views.Columns(1), threat, evidence.image_size)
        verdict = Vote().certify(evidence.values, relation.rows)
        margin = verdict.margin[:, relation.row_of] + self.broken.get("gift", 0)
        if self.broken.get("last"):
            margin[:, -1] = 1
        label = verdict.label
        if self.broken.get("threat") and threat == PatchThreat(1):
            label = 1 - label
        if isinstance(threat, SparseThreat):
            return Certificate(label, margin.amin(1, keepdim=True), threat, "")
        return Certificate(label, margin, threat, "", relation)

    def largest_patch(self, evidence):
        sides = [PatchThreat(side) for side in range(1, min(evidence.image_size) + 1)]
        certified = torch.stack([self.certificate(evidence, threat).certified for threat in sides])
        return certified.long().cumprod(0).sum(0) + self.broken.get("largest", 0)

    def check(self, images): ...

    def settings(self):
        return {}

    def forward_passes(self, image_size):
        return 1


def shades():
    return torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).repeat(1, 1, 6, 7)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [PatchThreat(2), PatchThreat((6, 3)), PatchThreat((6, 1), count=2), SparseThreat(2)])
def test_a_sound_defense_passes(threat):
    tried = check_defense(Brightest(), shades(), threat, trials=20)
    assert isinstance(tried, Report)
    assert tried.pictures == 2
    assert tried.attacks > 60 or isinstance(threat, SparseThreat)


@pytest.mark.parametrize(
    ("broken", "threat", "reason"),
    [
        ({"gift": 1}, PatchThreat((6, 4)), "a patch there makes it"),
        ({"gift": 7}, PatchThreat((6, 2), count=2), "a patch there makes it"),
        ({"last": True}, PatchThreat((6, 4)), "a patch there makes it"),
        ({"predict": True}, PatchThreat(2), "predict"),
        ({"threat": True}, PatchThreat(2), "changes the labels"),
        ({"overwrite": True}, PatchThreat(2), "alone|caller's pictures|predict|changes the labels"),
        ({"coupled": True}, PatchThreat(2), "alone"),
        ({"largest": 1}, PatchThreat(2), "largest_patch"),
        ({}, PatchThreat((6, 6)), "nothing was tried"),
    ],
    ids=str,
)
def test_broken_defenses_are_found(broken, threat, reason):
    with pytest.raises(AssertionError, match=reason):
        check_defense(Brightest(**broken), shades(), threat, trials=20)
