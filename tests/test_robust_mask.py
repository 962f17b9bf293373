"""Robust masking: literal reference, adversaries, numerics, the proof with Z3, and the algorithm that must not return."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
import z3

from certipatch.rules import ClippedSum, MaskedDetection, ProductWindows, RobustMask, Vote, Windows
from certipatch.testing import anything, check_rule, extremes, random_relation, random_scores

WINDOWS = {
    "flat": Windows.runs(6, 2),
    "circular": Windows.runs(6, 3, circular=True),
    "boxes": Windows.boxes((2, 3), (2, 2)),
    "two families": ProductWindows(Windows.runs(4, 2), Windows.runs(2, 1)),
    "larger than the map": Windows.runs(6, 9),
    "listed": Windows.from_masks(torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5),
}
FITTING = {name: windows for name, windows in WINDOWS.items() if not windows.members.all()}
THRESHOLDS = (0, 0.2, 0.5, 0.9, 1)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [math.inf, 1.0, 3.0])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("windows", FITTING.values(), ids=FITTING)
@torch.inference_mode()
def test_no_attack_breaks_a_margin(windows, threshold, clip):
    """Windows equal to, smaller and larger than what the attacker owns; real, one-hot, tied, empty and huge evidence."""
    rule = RobustMask(windows, threshold, clip)
    high = 1e8 if math.isinf(clip) else clip
    tried = check_rule(
        rule, views=6, classes=3, evidence=random_scores, attacks=anything(0.0, high, 150), slack=1e-4, trials=16
    )
    assert tried.changed > 1000
    check_rule(
        rule, views=6, classes=2, evidence=random_scores, attacks=extremes(0.0, high), slack=1e-4, trials=16, seed=1
    )


def literal_label(e, windows, threshold, clip):
    best, label = None, None
    for k in range(len(e[0])):
        scores = [min(max(view[k], 0), clip) for view in e]
        total = sum(scores)
        heaviest = max(sum(s for s, w in zip(scores, row, strict=True) if w) for row in windows)
        score = total - heaviest if threshold != 1 and heaviest > threshold * total else total
        if best is None or score > best:
            best, label = score, k
    return label


def literal_margin(e, y, windows, owned, threshold, clip):
    """The theorem by the book, in fractions."""

    def times(number, value):
        return 0 if number == 0 else number * value

    views, keep = range(len(e)), 1 - threshold

    def outside(k):
        return {v: min(max(e[v][k], 0), clip) for v in views if not owned[v]}

    own = outside(y)
    total = sum(own.values())
    lost = [Fraction(0)]
    for row in windows:
        m = sum(w and o for w, o in zip(row, owned, strict=True))
        held = sum(own[v] for v in own if row[v])
        feeds = math.inf if m and math.isinf(clip) else m * keep * (0 if math.isinf(clip) else clip)
        if threshold != 1 and (m or held) and held + feeds >= threshold * total:
            lost.append(held)
    lower, margins = total - max(lost), []
    for k in range(len(e[0])):
        if k == y:
            continue
        rest = outside(k)
        upper = sum(rest.values()) + times(sum(owned), clip)
        if threshold != 1:
            for row in windows:
                beyond = sum(o and not w for w, o in zip(row, owned, strict=True))
                upper = min(upper, (sum(rest[v] for v in rest if not row[v]) + times(beyond, clip)) / keep)
        margins.append(lower - upper)
    return min(margins)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [math.inf, 2])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@torch.inference_mode()
def test_against_the_literal_reference(windows, threshold, clip):
    generator = torch.Generator().manual_seed(3)
    exact = Fraction(threshold).limit_denominator(10)
    rows = windows.members.tolist()
    for kind in range(8):
        relation = random_relation(generator, 6, kind)
        e = torch.randint(-1, 5, (5, 6, 3), generator=generator)
        unsure = torch.rand(5, 6, generator=generator) < 0.15
        rule = RobustMask(windows, threshold, clip)
        for doubt in (None, unsure):
            verdict = rule.certify(e, relation, doubt)
            for b in range(5):
                values = [[Fraction(x) for x in view] for view in e[b].tolist()]
                label = literal_label(values, rows, exact, clip)
                assert verdict.label[b] == label
                for margin, row in zip(verdict.margin[b].tolist(), relation.tolist(), strict=True):
                    owned = row if doubt is None else [o or u for o, u in zip(row, doubt[b].tolist(), strict=True)]
                    expected = float(literal_margin(values, label, rows, owned, exact, clip))
                    assert margin == expected or abs(margin - expected) < 1e-12
                    assert not margin > expected  # slack only lowers it


def test_the_bound_on_the_true_class_is_attained():
    """Feeding an overlapping window until it is masked takes away exactly what the theorem says."""
    e = torch.tensor([[[5.0, 0], [4, 0], [1, 3], [0, 4.5]]]).double()
    owned = torch.tensor([[False, False, True, False]])  # window {1, 2} overlaps: 4 goes with it
    rule = RobustMask(Windows.runs(4, 2), 0.0)
    verdict = rule.certify(e, owned)
    assert verdict.label.tolist() == [0] or verdict.label.tolist() == [1]
    y = int(verdict.label[0])
    worst = min(_score(rule, attack(e[0], y, value)) for value in torch.linspace(0, 20, 200).tolist())
    values = e[0, :, y].masked_fill(owned[0], 0)
    expected = values.sum() - max(values[0:2].sum(), values[1:3].sum(), values[2:4].sum())
    assert worst == expected


def attack(e, y, value):
    attacked = e.clone()
    attacked[2] = 0
    attacked[2, y] = value
    return attacked[:, y]


def _score(rule, scores):
    windows = rule.windows.members
    return min(float(scores[~row].sum()) for row in windows)


def printed_defense(u, windows, threshold=0.0):
    """Algorithm 1 as printed: the predicted class chooses one window, and every class loses it."""
    label = int(u.sum(0).argmax())
    heaviest = max(windows, key=lambda w: float(u[w, label].sum()))
    if u[heaviest, label].sum() > threshold * u[:, label].sum():
        u = u.clone()
        u[heaviest] = 0
    return int(u.sum(0).argmax())


def printed_certificate(u, windows, y):
    """Algorithm 2 as printed, at T = 0."""
    if int(u.sum(0).argmax()) != y:
        return False
    for k, w in product(range(u.shape[1]), windows):
        if k == y:
            continue
        needed = float((u[~w, y] - u[~w, k]).sum())
        benign = [v for v in windows if not (v & w).any()]
        chosen = max(benign, key=lambda v: float(u[v, k].sum()), default=torch.zeros_like(w))
        partial = max(float(u[v & ~w, y].sum()) for v in windows if (v & w).any())
        if needed < 0 or float(u[chosen, y].sum()) > needed or partial > needed:
            return False
    return True


@pytest.mark.slow
def test_the_printed_algorithms_certify_what_an_attack_changes():
    """The attacker lifts a rival to just below the predicted class, which then throws away its own best window."""
    generator = torch.Generator().manual_seed(0)
    windows = list(Windows.runs(8, 2).members)
    certified = broken = held = 0
    for _ in range(600):
        u = torch.rand(8, 3, generator=generator).double()
        u[:, 0] += torch.rand(8, generator=generator).double()
        if not printed_certificate(u, windows, 0):
            continue
        certified += 1
        ours = RobustMask(torch.stack(windows)).certify(u[None], torch.stack(windows))
        found = False
        for place, (w, k) in enumerate((w, k) for w in windows for k in (1, 2)):
            attacked = u.clone()
            attacked[w] = 0
            attacked[w.int().argmax(), k] = max(0.0, float((u[~w, 0] - u[~w, k]).sum()) - 1e-6)
            found |= printed_defense(attacked, windows) != 0
            if ours.margin[0, place // 2] > 0:
                held += 1
                assert RobustMask(torch.stack(windows)).predict(attacked[None]).tolist() == ours.label.tolist()
        broken += found
    assert certified > 50
    assert broken == certified
    assert held > 100


def test_huge_evidence_of_an_attacker_never_swallows_the_others():
    """Sums of 1e20 and 1 round; totals less window sums would let the attacker in, or throw the true evidence away."""
    windows = Windows.runs(6, 2)
    e = torch.zeros(1, 6, 2).double()
    e[0, :, 0], e[0, 2:, 1] = 1, 0.4
    sees = windows.members
    for threshold in (0.0, 0.2):
        rule = RobustMask(windows, threshold)
        verdict = rule.certify(e, sees)
        assert verdict.label.tolist() == [0]
        assert verdict.margin[0].max() > 0
        for place in (verdict.margin[0] > 0).nonzero().flatten().tolist():
            for k, big, small in product((0, 1), (1e8, 1e20, 1e300, math.inf), (0, 1e3, 1e280)):
                for values in ((big, small), (small, big)):
                    attacked = e.clone()
                    attacked[0, sees[place]] = 0
                    attacked[0, sees[place], k] = torch.tensor(values, dtype=torch.float64)
                    assert rule.predict(attacked).tolist() == [0], (threshold, place, k, values)


def test_sums_of_tenths_at_threshold_one():
    """(0.1 + 0.2) + 0.3 > 0.1 + (0.2 + 0.3): a comparison at T = 1 would mask what holds everything."""
    e = torch.tensor([[[0.1, 0.0], [0.2, 0.3], [0.3, 0.0]]]).double()
    for windows in (Windows.runs(3, 3), Windows.from_masks(torch.ones(1, 3).bool())):
        assert RobustMask(windows, 1.0).predict(e).tolist() == [0]
        verdict = RobustMask(windows, 1.0, 0.5).certify(e, torch.zeros(1, 3).bool())
        assert verdict.margin[0, 0] == pytest.approx(0.3)


def test_windows_larger_than_the_map_certify_nothing():
    e = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(0))
    verdict = RobustMask(Windows.boxes((3, 3), (5, 5))).certify(e, Windows.boxes((3, 3), (5, 5)).members)
    assert (verdict.margin <= 0).all()


@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_structured_and_listed_windows_agree(clip):
    generator = torch.Generator().manual_seed(5)
    e = torch.rand(4, 30, 7, generator=generator)
    for structured in (Windows.boxes((5, 6), (2, 3)), Windows.boxes((5, 6), (4, 6)), Windows.runs(30, 4, True)):
        for sees in (Windows.boxes((5, 6), (2, 2)).members, Windows.runs(30, 5, True).members):
            for threshold in (0.0, 0.3):
                one = RobustMask(structured, threshold, clip).certify(e, sees)
                two = RobustMask(structured.members, threshold, clip).certify(e, sees)
                assert torch.equal(one.label, two.label)
                torch.testing.assert_close(one.margin, two.margin, rtol=0, atol=1e-11)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_windows_over_two_families_agree_with_a_list(threshold, clip):
    generator = torch.Generator().manual_seed(6)
    joint = ProductWindows(Windows.runs(5, 2, circular=True), Windows.runs(4, 2))
    listed = Windows.from_masks(joint.members)
    assert len(joint) == len(joint.members) == 15
    scores = torch.rand(30, 9, 4, generator=generator, dtype=torch.float64) ** 3
    scores[torch.arange(30), :, torch.randint(4, (30,), generator=generator)] += 0.3
    relations = [joint.members, Windows.from_masks(torch.rand(3, 9, generator=generator) < 0.4).members]
    relations.append(torch.eye(9, dtype=torch.bool))
    torch.testing.assert_close(joint.outside(scores), listed.outside(scores))
    for sees in relations:
        unsure = torch.rand(30, 9, generator=generator) < 0.05
        for doubt in (None, unsure):
            one, other = (RobustMask(w, threshold, clip).certify(scores, sees, doubt) for w in (joint, listed))
            assert torch.equal(one.label, other.label)
            torch.testing.assert_close(one.margin, other.margin)
        one, other = (MaskedDetection(w, 0.4).certify(scores, sees) for w in (joint, listed))
        assert torch.equal(one.alarm, other.alarm)
        torch.testing.assert_close(one.margin, other.margin)


def test_pictures_in_pieces(monkeypatch):
    e = torch.rand(9, 12, 3, generator=torch.Generator().manual_seed(1))
    windows = Windows.boxes((3, 4), (2, 2))
    whole = RobustMask(windows).certify(e, windows.members)
    monkeypatch.setattr("certipatch.rules.robust_mask.CHUNK_BYTES", 2000)
    pieces = RobustMask(windows).certify(e, windows.members)
    assert torch.equal(whole.label, pieces.label)
    assert torch.allclose(whole.margin, pieces.margin, rtol=0, atol=1e-12)
    empty = RobustMask(windows).certify(e[:0], windows.members)
    assert empty.margin.shape == (0, len(windows))


def test_error_of_the_scores_only_costs():
    generator = torch.Generator().manual_seed(2)
    e = torch.rand(20, 12, 3, generator=generator).double()
    e[:, :, 0] += 1.5
    windows = Windows.runs(12, 2, circular=True)
    for rule in (RobustMask(windows, 0.2), RobustMask(windows, 0.2, 2.5), ClippedSum(0, 2.5)):
        error = torch.full((20,), 1e-3, dtype=torch.float64)
        sure, wide = rule.certify(e, windows.members), rule.certify(e, windows.members, error=error)
        assert (wide.margin < sure.margin).all()
        moved = e + (torch.rand(e.shape, generator=generator) * 2 - 1) * 1e-3
        again = rule.certify(moved, windows.members)
        kept = wide.certified
        assert kept.any()
        assert torch.equal(again.label[kept], wide.label[kept])
        assert (again.margin >= wide.margin - 1e-9).all()


@pytest.mark.parametrize(
    ("windows", "threshold", "clip"),
    [(torch.ones(2, 3), 0, 1), (torch.zeros(0, 3).bool(), 0, 1), (torch.ones(1, 3).bool(), -0.1, 1),
     (torch.ones(1, 3).bool(), 1.5, 1), (torch.ones(1, 3).bool(), math.nan, 1), (torch.ones(1, 3).bool(), 0, 0),
     (torch.ones(1, 3).bool(), 0, math.nan), (torch.ones(1, 3).bool(), 0, -1)],
)  # fmt: skip
def test_settings_that_do_not_fit(windows, threshold, clip):
    with pytest.raises(ValueError):  # noqa: PT011
        RobustMask(windows, threshold, clip)


def test_evidence_that_does_not_fit():
    rule = RobustMask(torch.ones(1, 3).bool())
    for e, sees in (((1, 4, 2), (1, 4)), ((1, 3, 1), (1, 3)), ((1, 3, 2), (0, 3)), ((3, 2), (1, 3))):
        with pytest.raises(ValueError):  # noqa: PT011
            rule.certify(torch.zeros(e), torch.zeros(sees).bool())
    with pytest.raises(ValueError, match="NaN"):
        rule.predict(torch.full((1, 3, 2), math.nan))
    for bad in (torch.full((1,), -1.0).double(), torch.zeros(2).double(), torch.full((1,), math.nan).double()):
        with pytest.raises(ValueError, match="error"):
            rule.certify(torch.zeros(1, 3, 2), torch.zeros(1, 3).bool(), error=bad)
    with pytest.raises(ValueError, match="whole numbers"):
        Vote().certify(torch.zeros(1, 3, 2), torch.zeros(1, 3).bool(), error=torch.zeros(1).double())
    with pytest.raises(ValueError, match="at least 1"):
        Windows.runs(3, 0)


@pytest.mark.parametrize("threshold", [0, Fraction(1, 5), Fraction(1, 2), 1])
@pytest.mark.parametrize("clip", [None, 1])
def test_z3_the_theorem_for_three_views(threshold, clip):
    """Two classes, three views, windows of two neighbours, every set A; evidence and attack are free reals."""
    views, windows = 3, [(0, 1), (1, 2)]
    if threshold == 1 and clip is None:
        return  # nothing is ever certified there
    for owned in product((False, True), repeat=views):
        if not any(owned):
            continue
        solver = z3.SolverFor("QF_LRA")
        solver.set("timeout", 60_000)
        e = [[z3.Real(f"e{v}{k}") for k in range(2)] for v in range(views)]
        f = [[z3.Real(f"f{v}{k}") if owned[v] else e[v][k] for k in range(2)] for v in range(views)]
        for row in (*e, *f):
            solver.add(*(x >= 0 for x in row), *([x <= clip for x in row] if clip else []))
        lower, upper = z3.Real("lower"), z3.Real("upper")
        kept = z3.RealVal(str(1 - Fraction(threshold)))
        t = z3.RealVal(str(Fraction(threshold)))
        outside = [v for v in range(views) if not owned[v]]
        total = z3.Sum([e[v][0] for v in outside] + [z3.RealVal(0)])
        solver.add(lower <= total)
        bounds = []
        if clip:
            solver.add(upper == _min_of(bounds_of_rival(e, outside, owned, windows, kept, clip, threshold)))
        else:
            bounds = bounds_of_rival(e, outside, owned, windows, kept, clip, threshold)
            if not bounds:
                continue
            solver.add(upper == _min_of(bounds))
        for window in windows:
            if threshold == 1:
                break
            m = sum(owned[v] for v in window)
            held = z3.Sum([e[v][0] for v in window if not owned[v]] + [z3.RealVal(0)])
            feeds = z3.BoolVal(True) if m and not clip else held + kept * m * (clip or 0) >= t * total
            solver.add(z3.Implies(z3.And(feeds, z3.Or(m > 0, held > 0)), lower <= total - held))
        solver.add(lower > upper)  # certified: the true class 0 wins ties, class 1 does not; strict covers both
        scores = [_score_of(f, k, windows, t, threshold) for k in range(2)]
        solver.add(scores[1] >= scores[0])
        assert solver.check() == z3.unsat, (owned, threshold, clip)


def bounds_of_rival(e, outside, owned, windows, kept, clip, threshold):
    rest = z3.Sum([e[v][1] for v in outside] + [z3.RealVal(0)])
    bounds = [rest + sum(owned) * clip] if clip else []
    for window in windows:
        beyond = sum(owned[v] and v not in window for v in range(len(e)))
        if threshold == 1 or (beyond and not clip):
            continue
        left = z3.Sum([e[v][1] for v in outside if v not in window] + [z3.RealVal(0)])
        bounds.append((left + beyond * (clip or 0)) / kept)
    return bounds


def _min_of(values):
    least = values[0]
    for value in values[1:]:
        least = z3.If(value < least, value, least)
    return least


def _score_of(f, k, windows, t, threshold):
    total = z3.Sum([view[k] for view in f])
    if threshold == 1:
        return total
    sums = [z3.Sum([f[v][k] for v in window]) for window in windows]
    heaviest = sums[0]
    for value in sums[1:]:
        heaviest = z3.If(value > heaviest, value, heaviest)
    return z3.If(heaviest > t * total, total - heaviest, total)


def test_the_example_of_appendix_e():
    """C C W C C W C C W C C: the margin by location certifies what the paper's DS margin cannot; so does masking at 0."""
    votes = torch.tensor([[[float(s == "C"), float(s == "W")] for s in "CCWCCWCCWCC"]])
    windows = Windows.runs(11, 3)
    assert Vote().certify(votes, windows.members).certified.tolist() == [True]
    assert Vote(margin="paper").certify(votes, windows.members).certified.tolist() == [False]
    assert RobustMask(windows, 0.0).certify(votes, windows.members).certified.tolist() == [True]


def test_float32_evidence_beyond_1e30_ranks_as_in_float64():
    evidence = torch.zeros(1, 9, 70)
    evidence[0, :7, 0], evidence[0, :4, 1:64], evidence[0, [0, 2, 4], 69] = 9.9e29, 8e29, 3e38
    sees = torch.zeros(1, 9, dtype=torch.bool)
    sees[0, 7:] = True
    rule = RobustMask(Windows.runs(9, 2), 0.0)
    verdict, attacked = rule.certify(evidence, sees), evidence.clone()
    attacked[0, 7:, 1:69], attacked[0, 7:, 69] = 0.0, 3e38
    assert torch.equal(rule.predict(evidence), rule.predict(evidence.double()))
    assert not (verdict.margin > 0).any() or torch.equal(rule.predict(attacked), verdict.label)
