"""Clipped sums, median, trimmed mean and masked detection: brute force, literal references, Z3."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
import z3

from certipatch.rules import ClippedSum, MaskedDetection, Median, TrimmedMean, Windows
from certipatch.testing import anything, check_rule, extremes, random_relation, random_scores

BOUNDS = [(0.0, 1.0), (-1.0, 2.0), (-3.0, -1.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("lo", "hi"), BOUNDS[:2])
@pytest.mark.parametrize(("views", "classes"), [(1, 2), (4, 2), (5, 3), (6, 4)])
@torch.inference_mode()
def test_clipped_sum_brute_force(lo, hi, views, classes):
    tried = check_rule(
        ClippedSum(lo, hi), views=views, classes=classes, evidence=random_scores, attacks=extremes(lo, hi), slack=1e-6
    )
    assert tried.certified > 50
    assert tried.changed > 100


RANKS = {
    "median": lambda lo, hi: Median(lo, hi),
    "trimmed 0": lambda lo, hi: TrimmedMean(0, lo, hi),
    "trimmed 1": lambda lo, hi: TrimmedMean(1, lo, hi),
    "trimmed 2": lambda lo, hi: TrimmedMean(2, lo, hi),
}


@pytest.mark.slow
@pytest.mark.parametrize("views", [5, 6])
@pytest.mark.parametrize(("lo", "hi"), BOUNDS[:2])
@pytest.mark.parametrize("make", RANKS.values(), ids=RANKS)
@torch.inference_mode()
def test_order_statistics_brute_force(make, lo, hi, views):
    rule = make(lo, hi)
    check_rule(rule, views=views, classes=2, evidence=random_scores, attacks=extremes(lo, hi), slack=1e-6, trials=32)
    tried = check_rule(
        rule, views=views, classes=3, evidence=random_scores, attacks=anything(lo, hi, 100), slack=1e-6, trials=16
    )
    assert tried.changed > 100


def literal_means(values, owned, trim, lo, hi):
    """Least and largest trimmed mean with every owned value at lo, and at hi."""
    views = len(values)
    ends = []
    for end in (lo, hi):
        ranked = sorted(end if o else min(max(v, lo), hi) for v, o in zip(values, owned, strict=True))
        kept = ranked[trim : views - trim]
        ends.append(sum(kept) / len(kept))
    return ends


@pytest.mark.parametrize("views", [1, 2, 5, 6])
@pytest.mark.parametrize("make", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize(("lo", "hi"), [(0, 3), (-1, 2)])
def test_order_statistics_against_the_literal_reference(make, views, lo, hi):
    rule, generator = make(float(lo), float(hi)), torch.Generator().manual_seed(views)
    trim = (views - 1) // 2 if isinstance(rule, Median) else rule.trim
    if 2 * trim >= views:
        with pytest.raises(ValueError, match="leaves none"):
            rule.predict(torch.zeros(1, views, 2))
        return
    e = torch.randint(-2, 5, (6, views, 3), generator=generator)
    unsure = torch.rand(6, views, generator=generator) < 0.15
    for kind, doubt in product(range(8), (None, unsure)):
        relation = random_relation(generator, views, kind)
        verdict = rule.certify(e, relation, doubt)
        for b in range(6):
            columns = [[Fraction(x) for x in e[b, :, k].tolist()] for k in range(3)]
            clean = [literal_means(c, [False] * views, trim, lo, hi)[0] for c in columns]
            label = max(range(3), key=lambda k: (clean[k], -k))
            assert verdict.label[b] == label
            for margin, row in zip(verdict.margin[b].tolist(), relation.tolist(), strict=True):
                owned = row if doubt is None else [o or u for o, u in zip(row, doubt[b].tolist(), strict=True)]
                means = [literal_means(c, owned, trim, lo, hi) for c in columns]
                expected = float(min(means[label][0] - means[k][1] for k in range(3) if k != label))
                assert margin == pytest.approx(expected, abs=1e-12)
                assert margin <= expected


@pytest.mark.parametrize(("lo", "hi"), BOUNDS)
def test_clipped_sum_against_the_literal_reference(lo, hi):
    generator = torch.Generator().manual_seed(0)
    e = torch.randint(-4, 5, (6, 7, 3), generator=generator)
    unsure = torch.rand(6, 7, generator=generator) < 0.15
    rule = ClippedSum(lo, hi)
    for kind, doubt in product(range(8), (None, unsure)):
        relation = random_relation(generator, 7, kind)
        verdict = rule.certify(e, relation, doubt)
        scores = e.double().clamp(lo, hi)
        label = scores.sum(1).argmax(1)
        assert torch.equal(verdict.label, label)
        assert torch.equal(rule.predict(e), label)
        for b, place in product(range(6), range(len(relation))):
            owned = relation[place] | (False if doubt is None else doubt[b])
            rest, a, y = scores[b, ~owned].sum(0), int(owned.sum()), int(label[b])
            expected = min(float(rest[y] + a * lo - rest[k] - a * hi) for k in range(3) if k != y)
            assert verdict.margin[b, place] == pytest.approx(expected, abs=1e-12)
            assert verdict.margin[b, place] < expected  # a tie is not certified


def test_infinite_bounds():
    e = torch.tensor([[[3.0, 1.0], [3.0, 1.0], [2.0, 1.0]]])
    nobody, one = torch.zeros(1, 3).bool(), torch.tensor([[True, False, False]])
    for rule in (ClippedSum(-math.inf, math.inf), ClippedSum(0.0, math.inf), ClippedSum(-math.inf, 5.0)):
        assert rule.certify(e, nobody).margin.item() == pytest.approx(5)
        assert rule.certify(e, one).margin.item() == -math.inf
    assert Median().certify(e, one).margin.item() == pytest.approx(1)  # 2 or more against 1
    assert Median().certify(e, torch.ones(1, 3).bool()).margin.item() == -math.inf
    assert TrimmedMean(0).certify(e, one).margin.item() == -math.inf
    assert TrimmedMean(1).certify(e, one).margin.item() == pytest.approx(1)
    huge = torch.tensor([[[math.inf, 1.0], [3.0, -math.inf], [2.0, 1.0]]])
    for rule in (ClippedSum(0.0, 4.0), Median(), TrimmedMean(1)):
        assert torch.isfinite(rule.certify(huge, one).margin).all()


def test_ties_go_to_the_smaller_class():
    tied = torch.ones(1, 3, 3)
    tied[..., 0] = 0
    for rule in (ClippedSum(0.0, 1.0), Median(), TrimmedMean(1)):
        assert rule.predict(tied).tolist() == [1]
        assert not rule.certify(tied, torch.zeros(1, 3).bool()).certified.any()


@pytest.mark.parametrize("make", [lambda: ClippedSum(1, 1), lambda: ClippedSum(2, 1), lambda: ClippedSum(math.nan, 1),
                                  lambda: Median(1, 0), lambda: TrimmedMean(-1), lambda: TrimmedMean(1.5),
                                  lambda: TrimmedMean(True), lambda: TrimmedMean(1, 2, 1)])  # fmt: skip
def test_settings_that_do_not_fit(make):
    with pytest.raises(ValueError):  # noqa: PT011
        make()


@pytest.mark.parametrize("rule", [ClippedSum(0, 1), Median(), TrimmedMean(0)], ids=str)
def test_evidence_that_does_not_fit(rule):
    for e, sees in (
        ((1, 0, 2), (1, 0)),
        ((1, 3, 1), (1, 3)),
        ((1, 3, 2), (0, 3)),
        ((1, 3, 2), (1, 4)),
        ((3, 2), (1, 3)),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            rule.certify(torch.zeros(e), torch.zeros(sees).bool())
    with pytest.raises(ValueError, match="NaN"):
        rule.predict(torch.full((1, 3, 2), math.nan))
    assert rule.certify(torch.zeros(0, 3, 2), torch.zeros(2, 3).bool()).margin.shape == (0, 2)


def test_z3_clipped_sums():
    """Sums outside, |A| = a, and what the attacked views add, as any reals within their bounds."""
    sy, sk, a, lo, hi, ay, ak = z3.Reals("sy sk a lo hi ay ak")
    solver = z3.Solver()
    solver.add(lo <= hi, a >= 0, a * lo <= ay, ay <= a * hi, a * lo <= ak, ak <= a * hi)
    solver.add(sy + a * lo > sk + a * hi, sk + ak >= sy + ay)
    assert solver.check() == z3.unsat


@pytest.mark.parametrize("owned", [o for o in product((False, True), repeat=4) if sum(o) in (1, 2)])
def test_z3_ranks_of_four_values(owned):
    """Every attacked j-th smallest lies between the (j − a)-th and the j-th smallest of the others."""
    e = [z3.Real(f"e{v}") for v in range(4)]
    outside = [e[v] for v in range(4) if not owned[v]]
    a = sum(owned)
    for j in range(1, 5):
        solver = z3.Solver()
        rank = z3.Real("rank")  # the j-th smallest of all: j values ≤ it, 4 − j + 1 values ≥ it
        solver.add(z3.Or([rank == x for x in e]))
        solver.add(
            z3.Sum([z3.If(x <= rank, 1, 0) for x in e]) >= j, z3.Sum([z3.If(x >= rank, 1, 0) for x in e]) >= 5 - j
        )
        wrong = []
        if j - a >= 1:  # below the (j − a)-th of the others: fewer than j − a of them are ≤ it
            wrong.append(z3.Sum([z3.If(x <= rank, 1, 0) for x in outside]) < j - a)
        if j <= len(outside):  # above the j-th of the others: fewer than len − j + 1 of them are ≥ it
            wrong.append(z3.Sum([z3.If(x >= rank, 1, 0) for x in outside]) < len(outside) - j + 1)
        solver.add(z3.Or(wrong) if wrong else z3.BoolVal(False))
        assert solver.check() == z3.unsat


# Detection ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
@pytest.mark.parametrize(
    "windows", [Windows.runs(6, 2), Windows.runs(6, 3, circular=True), Windows.boxes((2, 3), (1, 2))]
)
def test_no_attack_goes_unnoticed_where_detection_is_certified(windows, threshold):
    generator = torch.Generator().manual_seed(0)
    rule, certified, changed = MaskedDetection(windows, threshold), 0, 0
    for trial in range(24):
        sees = random_relation(generator, 6, trial)
        e = 3 * random_scores(generator, sees, 3)
        verdict = rule.certify(e, sees)
        assert torch.equal(verdict.label, rule.predict(e))
        assert verdict.alarm is not None
        assert torch.equal(verdict.alarm, rule.alarm(e))
        assert not (verdict.certified & verdict.alarm).any()
        for b, place in (verdict.margin > 0).nonzero().tolist():
            attacked = anything(-50.0, 50.0, 100)(generator, e[b], sees[place])
            answers = rule.predict(attacked)
            certified += 1
            changed += int((answers != verdict.label[b]).sum())
            assert (rule.alarm(attacked) | (answers == verdict.label[b])).all()
    assert certified > 20
    assert changed > 20


def test_detection_literally():
    e = torch.tensor([[[4.0, 0.0], [4.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [-1.0, 1.0], [0.0, 0.0]]]).double()
    windows, sees = torch.eye(3).bool(), torch.eye(3).bool()
    verdict = MaskedDetection(windows, 0.5).certify(e, sees)
    for b in range(2):
        label = int(e[b].sum(0).argmax())
        answers = [e[b][[v for v in range(3) if v != w]].mean(0).softmax(0) for w in range(3)]
        alarm = any(int(p.argmax()) != label and p.max() > 0.5 for p in answers)
        assert bool(verdict.alarm[b]) == alarm
        for w in range(3):
            says = float(answers[w][label]) - 0.5 if int(answers[w].argmax()) == label and not alarm else -math.inf
            assert verdict.margin[b, w] == pytest.approx(says)
    with pytest.raises(ValueError, match="unsure"):
        MaskedDetection(windows).certify(e, sees, torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="views"):
        MaskedDetection(torch.eye(4).bool()).certify(e, sees)
    with pytest.raises(ValueError, match="threshold"):
        MaskedDetection(windows, 1.0)
