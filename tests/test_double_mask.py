"""Double masking and Minority Reports on bare tables: brute force, a literal reference, ties, Z3; and their mask sets."""

import math
from itertools import combinations_with_replacement, product

import pytest
import torch
import z3
from hypothesis import given
from hypothesis import strategies as st

from certipatch.errors import InputError
from certipatch.rules import DoubleMask, MinorityReports
from certipatch.rules.double_mask import FALLBACKS
from certipatch.testing import anything, check_rule
from certipatch.threats import PatchThreat
from certipatch.views import MaskPairs, PixelSets, mask_set
from certipatch.views.incidence import sees
from certipatch.views.masks import axis_masks, pair_table

# Tables -------------------------------------------------------------------------------------------------------------


def pairs(masks):
    return list(combinations_with_replacement(range(masks), 2))


def one_hot(answers, classes):
    return torch.nn.functional.one_hot(torch.tensor(answers), classes)


def hidden_by(covering, masks):
    """Row of ``sees``: the attacker owns every pair without a covering mask."""
    return [i not in covering and j not in covering for i, j in pairs(masks)]


def masks_of(views):
    """M of M(M+1)/2 views, or of those and the whole picture."""
    return (math.isqrt(8 * views + 1) - 1) // 2


def tables(generator, relation, classes):
    """Tables of seven pictures: any, nearly one class, one class with one row or pair wrong, tied scores, real scores."""
    views = relation.shape[1]
    answers = torch.randint(0, classes, (7, views), generator=generator)
    favourite = int(torch.randint(classes, (1,), generator=generator))
    answers[1:, :] = torch.where(torch.rand(6, views, generator=generator) < 0.07, answers[1:], favourite)
    answers[2] = favourite
    answers[2, int(torch.randint(views, (1,), generator=generator))] = (favourite + 1) % classes
    scores = torch.nn.functional.one_hot(answers, classes).double()
    scores[4:] += torch.randint(0, 2, scores[4:].shape, generator=generator)  # ties with the prediction
    scores[6] += torch.rand(scores[6].shape, generator=generator, dtype=torch.float64)
    return scores


def any_table(generator, evidence, owned):
    """Attacks on a table: one class everywhere, one class in every row, and whatever."""
    views, classes = evidence.shape
    masks = masks_of(views)
    first = torch.tensor([i for i, _ in pairs(masks)] + [0] * (views - len(pairs(masks))))
    everywhere = torch.arange(classes)[:, None].expand(-1, views)
    by_row = torch.randint(0, classes, (120, masks), generator=generator)[:, first]
    noise = torch.randint(0, classes, (120, views), generator=generator)
    mixed = torch.where(torch.rand(120, views, generator=generator) < 0.8, by_row, noise)
    answers = torch.cat([everywhere, by_row, noise, mixed])
    wanted = torch.nn.functional.one_hot(answers, classes).to(evidence.dtype) * 5
    return torch.where(owned[:, None], wanted, evidence)


@pytest.mark.slow
@pytest.mark.parametrize(("masks", "classes"), [(1, 2), (2, 2), (2, 3), (3, 3), (4, 3)])
@pytest.mark.parametrize("gap", [0.0, 0.9])
@pytest.mark.parametrize("unmasked", [False, True])
@torch.inference_mode()
def test_brute_force(masks, classes, gap, unmasked):
    rule = DoubleMask(gap, FALLBACKS[unmasked])
    tried = check_rule(
        rule, views=len(pairs(masks)) + unmasked, classes=classes, evidence=tables, attacks=any_table, trials=32
    )
    assert tried.certified > 80
    assert masks == 1 or tried.changed > 80


def literal_label(table, masks, classes, may_win=lambda d: True, unmasked=None):
    """Algorithm 1, line by line; only masks that may win do. ``table[i, j]`` with i ≤ j; ``unmasked`` replaces the majority."""
    alone = [table[i, i] for i in range(masks)]
    majority = max(range(classes), key=lambda k: (alone.count(k), -k)) if unmasked is None else unmasked
    for d in range(masks):
        if alone[d] != majority and all(table[min(d, j), max(d, j)] == alone[d] for j in range(masks)) and may_win(d):
            return alone[d]
    return majority


@pytest.mark.parametrize(("masks", "classes"), [(1, 2), (2, 2), (2, 3), (3, 2), (1, 4)])
@pytest.mark.parametrize("unmasked", [False, True])
def test_every_table_against_every_attack(masks, classes, unmasked):
    """All tables, all sets of covering masks, all attacks on what no covering mask protects: the certificate is right,
    and where less than half of the masks cover, or the whole picture decides, it is exact."""
    rule, names = DoubleMask(fallback=FALLBACKS[unmasked]), [*pairs(masks), *["unmasked"] * unmasked]
    every = list(product(range(classes), repeat=len(names)))
    labels = rule.predict(one_hot(every, classes)).tolist()
    said = [dict(zip(names, t, strict=True)) for t in every]
    assert labels == [literal_label(t, masks, classes, unmasked=t.get("unmasked")) for t in said]
    for covering in product((False, True), repeat=masks):
        protecting = [c for c in range(masks) if covering[c]]
        owned = hidden_by(protecting, masks) + [True] * unmasked
        verdict = rule.certify(one_hot(every, classes), torch.tensor([owned]))
        assert verdict.label.tolist() == labels
        reached = {}
        for table, label in zip(every, labels, strict=True):
            reached.setdefault(tuple(a for a, o in zip(table, owned, strict=True) if not o), set()).add(label)
        for table, label, margin in zip(every, labels, verdict.margin[:, 0].tolist(), strict=True):
            able = reached[tuple(a for a, o in zip(table, owned, strict=True) if not o)] != {label}
            full = dict(zip(names, table, strict=True))
            rows = [{full[min(c, j), max(c, j)] for j in range(masks)} == {label} for c in protecting]
            assert (margin > 0) == any(rows)
            assert not (margin > 0 and able)
            if unmasked or 2 * len(protecting) < masks:
                assert (margin > 0) != able


@st.composite
def cases(draw):
    masks, classes, batch, locations = (draw(st.integers(*r)) for r in ((1, 7), (2, 5), (0, 4), (1, 5)))
    views = len(pairs(masks)) + draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.randint(0, 3, (batch, views, classes), generator=generator).double()
    scores[:, :, draw(st.integers(0, classes - 1))] += draw(st.sampled_from([0.0, 1.0, 2.0, 2.5]))
    if draw(st.booleans()):
        scores = scores.long()
    relation = torch.rand(locations, views, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    unsure = torch.rand(scores.shape[:2], generator=generator) < 0.05 if draw(st.booleans()) else None
    return masks, scores, relation, unsure


@given(cases(), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_against_the_literal_reference(case, gap):
    masks, scores, relation, unsure = case
    pictured = scores.shape[1] > len(pairs(masks))
    verdict = DoubleMask(gap, FALLBACKS[pictured]).certify(scores, relation, unsure)
    classes, whole = scores.shape[2], not scores.is_floating_point()
    for b, table in enumerate(scores.tolist()):
        said = [max(range(classes), key=lambda k: (row[k], -k)) for row in table]
        answers, table = dict(zip(pairs(masks), said, strict=False)), table[: len(pairs(masks))]
        rows = [[(min(c, j), max(c, j)) for j in range(masks)] for c in range(masks)]
        tops = {p: sorted(row)[-1] - sorted(row)[-2] for p, row in zip(pairs(masks), table, strict=True)}
        means = [math.fsum(tops[p] for p in row) / masks for row in rows]
        near = gap and any(abs(mean - gap) < 1e-6 for mean in means)  # a sum in another order decides otherwise
        instead = said[-1] if pictured else None
        y = literal_label(answers, masks, classes, lambda d, means=means: means[d] >= gap, instead)
        if near:
            continue
        assert verdict.label[b] == y
        for place, owned in enumerate(relation.tolist()):
            taken = [o or (unsure is not None and u) for o, u in
                     zip(owned, unsure[b].tolist() if unsure is not None else owned, strict=True)]  # fmt: skip
            owned, taken = owned[: len(table)], taken[: len(table)]  # whoever has the whole picture
            lead = {
                p: -math.inf
                if t and not o
                else min(row[y] - row[k] + whole * (1 - (y > k)) for k in range(classes) if k != y)
                for p, row, t, o in zip(pairs(masks), table, taken, owned, strict=True)
            }
            free = dict(zip(pairs(masks), owned, strict=True))
            margins = [
                min(min(lead[p] for p in row), mean - gap if gap else math.inf)
                for row, mean in zip(rows, means, strict=True)
                if not any(free[p] for p in row)
            ]
            assert verdict.margin[b, place] == pytest.approx(max(margins, default=-math.inf), abs=1e-6)
    assert torch.equal(verdict.certified, (verdict.margin > 0).all(1))


@pytest.mark.slow
@given(cases(), st.floats(0, 2), st.sampled_from([0.0, 0.3, 1.0]))
def test_doubt_only_costs(case, off, gap):
    masks, scores, relation, unsure = case
    rule = DoubleMask(gap, FALLBACKS[scores.shape[1] > len(pairs(masks))])
    verdict = rule.certify(scores, relation)
    for worse in (
        rule.certify(scores, relation, error=torch.full((len(scores),), off, dtype=torch.float64)),
        rule.certify(scores, relation, unsure),
    ):
        assert (worse.margin <= verdict.margin).all()
        assert torch.equal(worse.label, verdict.label)


def test_ties_go_to_the_smaller_class():
    assert DoubleMask().predict(torch.zeros(1, 6, 3)).tolist() == [0]
    even = one_hot([[2, 2, 2, 1, 1, 1]], 3)  # masks 0: 2, 1: 1, 2: 1 → majority 1; mask 0 stays 2 in all its pairs
    assert DoubleMask().predict(even).tolist() == [2]
    two = one_hot([[2, 0, 1]], 3)  # one vote each: the smaller is the majority, the other's pair fails it
    assert DoubleMask().predict(two).tolist() == [1]
    nobody = torch.zeros(1, 3).bool()
    tied = torch.tensor([[[1, 1, 0]] * 3])
    assert DoubleMask().certify(tied, nobody).certified.tolist() == [True]  # of integers a tie is an answer
    assert DoubleMask().certify(tied.float(), nobody).certified.tolist() == [False]  # of reals rounding could turn it
    assert DoubleMask().certify(tied.flip(2), nobody).label.tolist() == [1]


def test_integers_whose_difference_does_not_fit_an_integer():
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    values = torch.tensor([least, least + 1, -(2**62) - 10, -1, 0, 1, 2**62, 2**62 + 1, most - 1, most])
    table = values[torch.randint(len(values), (500, 6, 3), generator=torch.Generator().manual_seed(0))]
    nobody = torch.zeros(1, 6).bool()
    kept = DoubleMask().certify(table, nobody)
    assert torch.equal(kept.certified, certified_literally(table.argmax(2), kept.label))
    every = torch.tensor([[[5, 0], [-(2**62) - 10, 2**62], [5, 0]]])  # the pair answers 1, and is nobody's
    assert not DoubleMask().certify(every, torch.tensor([[False, False, True]])).certified.any()


def certified_literally(predicted: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Whether some of three masks predicts the label alone and with every second mask."""
    right = (predicted == label[:, None])[:, torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])]
    return right.all(2).any(1)


def test_tables_that_do_not_fit():
    for shape, views in (((1, 2, 2), 2), ((1, 4, 2), 4), ((1, 0, 2), 0), ((1, 3, 1), 3), ((3, 2), 3)):
        with pytest.raises(ValueError):  # noqa: PT011
            DoubleMask().certify(torch.zeros(shape), torch.zeros(1, views).bool())
    with pytest.raises(ValueError, match="M\\(M\\+1\\)/2"):
        DoubleMask().predict(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="NaN"):
        DoubleMask().predict(torch.full((1, 3, 2), math.nan))
    empty = DoubleMask().certify(torch.zeros(0, 3, 2), torch.zeros(2, 3).bool())
    assert empty.margin.shape == (0, 2)


def test_the_whole_picture_decides_where_no_mask_wins():
    rule = DoubleMask(fallback="unmasked")
    assert rule.predict(one_hot([[1, 1, 1, 0]], 3)).tolist() == [1]  # all masks against the whole picture
    assert rule.predict(one_hot([[1, 0, 1, 2]], 3)).tolist() == [2]  # none survives, whatever the majority says
    assert rule.predict(one_hot([[1, 0, 0, 0]], 3)).tolist() == [0]
    with pytest.raises(ValueError, match="M\\(M\\+1\\)/2"):
        rule.predict(one_hot([[1, 1, 1]], 3))


@pytest.mark.parametrize("covering", [(0,), (1,), (0, 2)])
@pytest.mark.parametrize("unmasked", [False, True])
def test_z3_no_table_escapes(covering, unmasked):
    """Three masks, three classes: every clean and every attacked table with the same protected pairs, as free integers,
    with free leads, and any demand on the sum of a mask's leads, none too; and any answers to the whole picture."""
    masks, classes = 3, 3
    clean = {p: z3.Int(f"e{p}") for p in pairs(masks)}
    free = {p: z3.Int(f"f{p}") for p in pairs(masks)}
    leads = [{p: z3.Real(f"{name}{p}") for p in pairs(masks)} for name in ("d", "g")]
    sure, wholes = z3.Real("sure"), [z3.Int("clean whole"), z3.Int("free whole")]
    owned = dict(zip(pairs(masks), hidden_by(covering, masks), strict=True))

    def at(table, i, j):
        return table[min(i, j), max(i, j)]

    def may_win(lead, d):
        return z3.Sum([at(lead, d, j) for j in range(masks)]) >= sure

    def label(table, lead, pictured):
        alone = [table[i, i] for i in range(masks)]
        count = [z3.Sum([z3.If(a == k, 1, 0) for a in alone]) for k in range(classes)]
        result = z3.If(z3.And(count[0] >= count[1], count[0] >= count[2]), 0, z3.If(count[1] >= count[2], 1, 2))
        otherwise = result = pictured if unmasked else result
        for d in reversed(range(masks)):
            stays = z3.And([at(table, d, j) == alone[d] for j in range(masks)])
            result = z3.If(z3.And(alone[d] != otherwise, stays, may_win(lead, d)), alone[d], result)
        return result

    y, solver = z3.Int("y"), z3.Solver()
    solver.add([z3.And(v >= 0, v < classes) for v in [*clean.values(), *free.values(), *wholes, y]])
    solver.add([clean[p] == free[p] for p in pairs(masks) if not owned[p]])
    solver.add([leads[0][p] == leads[1][p] for p in pairs(masks) if not owned[p]])
    solver.add(z3.Or([z3.And([*(at(clean, c, j) == y for j in range(masks)), may_win(leads[0], c)]) for c in covering]))
    assert solver.check() == z3.sat
    solver.add(z3.Or(label(clean, leads[0], wholes[0]) != y, label(free, leads[1], wholes[1]) != y))
    assert solver.check() == z3.unsat


# Detection ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9])
@torch.inference_mode()
def test_no_attack_goes_unnoticed_where_minority_reports_certify(threshold):
    generator, rule = torch.Generator().manual_seed(0), MinorityReports(threshold)
    certified = changed = 0
    for trial in range(40):
        relation = torch.rand(4, 5, generator=generator) < 0.6
        relation[:, 0] = True  # the whole picture shows every patch
        scores = (3 * torch.rand(6, 5, 3, generator=generator) + torch.tensor([0.0, 3 * (trial % 2), 0.0])).softmax(2)
        scores[3:] = (4 * scores[3:]).round() / 4  # ties
        verdict = rule.certify(scores, relation)
        assert torch.equal(verdict.alarm, rule.alarm(scores))
        for b, place in (verdict.margin > 0).nonzero().tolist():
            attacked = anything(0.0, 1.0, 200)(generator, scores[b], relation[place])
            answers = rule.predict(attacked)
            certified, changed = certified + 1, changed + int((answers != verdict.label[b]).sum())
            assert (rule.alarm(attacked) | (answers == verdict.label[b])).all()
    assert certified > 50
    assert changed > 50


def test_minority_reports_literally():
    quarters = torch.tensor(list(product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=4))).view(-1, 2, 2)
    for threshold in (0.0, 0.25, 0.5):
        verdict = MinorityReports(threshold).certify(quarters, torch.tensor([[True, False], [True, True]]))
        for scores, label, alarm, margin in zip(
            quarters.tolist(), verdict.label.tolist(), verdict.alarm.tolist(), verdict.margin.tolist(), strict=True
        ):
            (whole, under) = scores
            y = 0 if whole[0] >= whole[1] else 1
            other = 1 - y
            assert label == y
            assert alarm == (under[other] > threshold and under[other] >= under[y])
            assert (margin[0] > 0) == (not alarm and under[y] > under[other] and under[y] > threshold)
            assert margin[1] == -math.inf
    with pytest.raises(ValueError, match="unsure"):
        MinorityReports().certify(quarters, torch.zeros(1, 2).bool(), torch.ones(len(quarters), 2).bool())
    with pytest.raises(ValueError, match="at least one masked"):
        MinorityReports().certify(quarters[:, :1], torch.zeros(1, 1).bool())
    with pytest.raises(ValueError, match="threshold"):
        MinorityReports(1.0)


def test_rounding_raises_alarms_and_certifies_less():
    scores = torch.tensor([[[0.6, 0.4], [0.55, 0.45]]])
    nobody = torch.tensor([[True, False]])
    assert MinorityReports(0.5).certify(scores, nobody).certified.tolist() == [True]
    doubt = MinorityReports(0.5).certify(scores, nobody, error=torch.tensor([0.06], dtype=torch.float64))
    assert (doubt.certified.tolist(), doubt.alarm.tolist()) == ([False], [True])


# Mask sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 13))
def test_axis_masks_cover_every_run(length):
    for patch, masks in product(range(1, length + 1), range(1, length + 2)):
        width, starts = axis_masks(length, patch, masks)
        assert len(starts) <= masks
        assert all(start + width <= length for start in starts)
        for t in range(length - patch + 1):
            assert any(start <= t and t + patch <= start + width for start in starts)
        stride = -(-(length - patch + 1) // masks)
        assert width == min(patch + stride - 1, length)
        assert starts == sorted({min(i * stride, length - width) for i in range(masks)})


@pytest.mark.parametrize(
    ("threat", "size", "masks", "stride"),
    [
        (PatchThreat(3), (12, 12), (3, 3), None),
        (PatchThreat((7, 5)), (32, 32), (4, 4), None),
        (PatchThreat((2, 5)), (9, 17), (2, 4), None),
        (PatchThreat("2%"), (20, 31), (3, 5), None),
        (PatchThreat(6, shape="line"), (11, 9), (3, 3), None),
        (PatchThreat(12, shape="rectangle"), (14, 13), (3, 3), None),
        (PatchThreat(7, shape="diamond"), (12, 12), (3, 3), None),
        (PatchThreat(3, where="corners"), (12, 12), (3, 3), None),
        (PatchThreat(2, count=2), (8, 8), (2, 3), None),
        (PatchThreat(1, count=3), (4, 4), (2, 2), None),
        (PatchThreat(3), (12, 12), None, (2, 5)),
        (PatchThreat((9, 11)), (9, 11), (6, 6), None),
        (PatchThreat(9), (9, 11), (6, 6), None),
        (PatchThreat(3), (12, 12), (1, 1), None),
    ],
)
def test_mask_sets_cover_their_threat(threat, size, masks, stride):
    found = mask_set([threat], size, masks, stride)
    relation = sees(PixelSets(~found), threat, size)
    assert not relation.rows.all(1).any()  # no place is seen under every mask
    for mask in found:  # and no mask is there for nothing, where patches may lie anywhere
        rest = found[(found != mask).flatten(1).any(1)]
        if threat.count == 1 and threat.where == "anywhere" and threat.shape is None and len(rest):
            assert sees(PixelSets(~rest), threat, size).rows.all(1).any()


def test_several_threats_at_once():
    flat, tall = PatchThreat((2, 6)), PatchThreat((6, 2))
    found = mask_set([flat, tall], (14, 14), (3, 3))
    assert len(found) == 18
    for threat in (flat, tall, PatchThreat(2)):
        assert not sees(PixelSets(~found), threat, (14, 14)).rows.all(1).any()
    assert len(mask_set([PatchThreat(2), PatchThreat(5)], (14, 14), (3, 3))) == 9  # the smaller is within the larger


def test_masks_that_do_not_fit():
    with pytest.raises(InputError, match=r"does not cover 7×5 patches.*use k ≥ 6"):
        mask_set([PatchThreat((7, 5))], (32, 32), (4, 4), (5, 5))
    assert len(mask_set([PatchThreat((7, 5))], (32, 32), (6, 6), (5, 5))) == 36
    with pytest.raises(InputError, match="does not fit"):
        mask_set([PatchThreat(9)], (8, 12))
    with pytest.raises(InputError, match="fewer masks"):
        mask_set([PatchThreat(1)], (64, 64), (64, 64))
    with pytest.raises(InputError, match="fewer masks"):
        mask_set([PatchThreat(1, count=3)], (64, 64), (8, 8))
    for wrong in (torch.ones(2, 3), torch.ones(3, 3).bool(), torch.ones(0, 3, 3).bool()):
        with pytest.raises(ValueError):  # noqa: PT011
            MaskPairs(wrong)


def test_pairs_of_masks():
    masks = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    views, table = MaskPairs(masks), pair_table(4)
    assert views.number((5, 6)) == 10
    assert [int(table[p]) for p in pairs(4)] == list(range(10))
    assert torch.equal(table, table.T)
    for i, j in product(range(4), repeat=2):
        shown = views.visible((5, 6), table[i, j : j + 1])[0]
        assert torch.equal(shown, ~masks[i] & ~masks[j])
    with pytest.raises(InputError, match="not \\(6, 5\\)"):
        views.number((6, 5))
