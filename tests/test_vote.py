"""Vote: brute force, an exhaustive differential test, properties, and the inequality proved with Z3."""

from itertools import product

import pytest
import torch
import z3
from hypothesis import given
from hypothesis import strategies as st

from certipatch.rules import Verdict, Vote
from certipatch.testing import check_rule

BOTH = (Vote(), Vote(margin="paper"))


@pytest.mark.slow
@pytest.mark.parametrize(("views", "classes"), [(1, 2), (2, 2), (3, 3), (4, 3), (6, 2), (5, 4), (12, 3)])
@torch.inference_mode()
def test_brute_force(views, classes):
    tried = check_rule(Vote(), views=views, classes=classes, exact=True, seed=views)
    assert tried.certified > 100
    assert tried.locations - tried.certified > 100
    if views > 1:  # with one view there is nothing that the paper's margin could certify
        check_rule(BOTH[1], views=views, classes=classes, seed=views)


def literal_label(votes):
    counts = [sum(view[k] for view in votes) for k in range(len(votes[0]))]
    return max(range(len(counts)), key=lambda k: (counts[k], -k))


def literal_margins(votes, rows, unsure):
    """Both margins by the book: sums in Python, one rival after the other."""
    classes, y = range(len(votes[0])), literal_label(votes)
    location = []
    for row in rows:
        owned = [s or u for s, u in zip(row, unsure, strict=True)]
        n = [sum(view[k] for view, o in zip(votes, owned, strict=True) if not o) for k in classes]
        location.append(min(n[y] - n[k] - sum(owned) - (y > k) for k in classes if k != y) + 1)
    n = [sum(view[k] for view, u in zip(votes, unsure, strict=True) if not u) for k in classes]
    worst = max(map(sum, rows))
    paper = min(n[y] - n[k] - 2 * worst - sum(unsure) - (y > k) for k in classes if k != y) + 1
    return location, paper


@pytest.mark.parametrize(("views", "classes"), [(1, 2), (2, 2), (3, 2), (4, 2), (1, 3), (2, 3), (3, 3)])
def test_every_small_map(views, classes):
    """All 0/1 maps, all window relations (flat and circular, every width), with and without an unsure view."""
    maps = torch.tensor(list(product((0, 1), repeat=views * classes))).view(-1, views, classes)
    for width, wrap in product(range(views + 1), (False, True)):
        starts = range(views if wrap else views - width + 1)
        rows = [[(v - s) % views < width for v in range(views)] for s in starts]
        for doubtful in (None, 0):
            unsure = [v == doubtful for v in range(views)]
            given_unsure = None if doubtful is None else torch.tensor(unsure).expand(len(maps), -1)
            location, paper = (rule.certify(maps, torch.tensor(rows), given_unsure) for rule in BOTH)
            for votes, label, margin, worst in zip(
                maps.tolist(), location.label.tolist(), location.margin.tolist(), paper.margin.tolist(), strict=True
            ):
                expected, paper_margin = literal_margins(votes, rows, unsure)
                assert label == literal_label(votes)
                assert margin == expected, (votes, rows, unsure)
                assert worst == [paper_margin] * len(rows)


@st.composite
def cases(draw):
    views, classes, batch, locations = (draw(st.integers(*r)) for r in ((1, 40), (2, 6), (0, 4), (1, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chance = torch.rand(batch, 1, classes, generator=generator)
    votes = torch.rand(batch, views, classes, generator=generator) < chance
    sees = torch.rand(locations, views, generator=generator) < torch.rand(locations, 1, generator=generator) / 2
    unsure = torch.rand(batch, views, generator=generator) < 0.1 if draw(st.booleans()) else None
    return votes, sees, unsure


@given(cases())
def test_against_the_literal_reference(case):
    votes, sees, unsure = case
    location, paper = (rule.certify(votes, sees, unsure) for rule in BOTH)
    doubt = torch.zeros(votes.shape[:2]).bool() if unsure is None else unsure
    for b in range(len(votes)):
        expected, worst = literal_margins(votes[b].tolist(), sees.tolist(), doubt[b].tolist())
        assert location.margin[b].tolist() == expected
        assert paper.margin[b].tolist() == [worst] * len(sees)
    assert (paper.margin <= location.margin).all()  # never stronger
    assert torch.equal(location.certified, (location.margin > 0).all(1))


@given(cases(), st.integers(0, 2**16))
def test_order_of_views_and_attacks_never_matter(case, seed):
    votes, sees, unsure = case
    order = torch.randperm(votes.shape[1], generator=torch.Generator().manual_seed(seed))
    verdict = Vote().certify(votes, sees, unsure)
    again = Vote().certify(votes[:, order], sees[:, order], None if unsure is None else unsure[:, order])
    assert torch.equal(verdict.margin, again.margin)
    more = Vote().certify(votes, sees, torch.ones(votes.shape[:2]).bool())
    assert (more.margin <= verdict.margin).all()  # doubt only costs
    assert (more.margin <= 0).all()


def symbols(*names):
    return [z3.Int(name) for name in names]


def wins(y_votes, k_votes, y_larger):
    """y beats the rival: the smaller index wins a tie."""
    return z3.If(y_larger, y_votes > k_votes, y_votes >= k_votes)


def unsatisfiable(*formulas):
    solver = z3.Solver()
    solver.add(*formulas)
    return solver.check() == z3.unsat


def test_z3_the_inequality_for_any_number_of_views():
    """n(out) of y and k, |A| = a, and what the attacked views say, as any whole (or real) numbers."""
    for kind in (z3.Ints, z3.Reals):
        ny, nk, a, cy, ck, ay, ak, m = kind("ny nk a cy ck ay ak m")
        larger = z3.Bool("y_larger")
        tie = z3.If(larger, 1, 0)
        sane = [ny >= 0, nk >= 0, a >= 0, *(z3.And(c >= 0, c <= a) for c in (cy, ck, ay, ak))]
        holds = ny - nk - a >= tie
        assert unsatisfiable(*sane, holds, z3.Not(wins(ny + ay, nk + ak, larger)))
        paper = (ny + cy) - (nk + ck) - 2 * m >= tie  # clean votes cy, ck of A; m the largest |A|
        assert unsatisfiable(*sane, m >= a, paper, z3.Not(holds))
        if kind is z3.Ints:  # exact: where it fails, all of A voting for k alone wins
            assert unsatisfiable(*sane, z3.Not(holds), wins(ny, nk + a, larger))
        else:
            assert not unsatisfiable(*sane, z3.Not(holds), wins(ny, nk + a, larger))  # over the reals 0 < lead < 1


@pytest.mark.parametrize("classes", [2, 3])
def test_z3_the_rule_vote_by_vote(classes):
    """Three views, every set A, every y: votes and attacked votes are free booleans."""
    views = 3
    e = [[z3.Bool(f"e{v}{k}") for k in range(classes)] for v in range(views)]
    f = [[z3.Bool(f"f{v}{k}") for k in range(classes)] for v in range(views)]

    def total(table, k, members):
        return z3.Sum([z3.If(table[v][k], 1, 0) for v in members] + [z3.IntVal(0)])

    for owned in product((False, True), repeat=views):
        outside = [v for v in range(views) if not owned[v]]
        same = [f[v][k] == e[v][k] for v in outside for k in range(classes)]
        for y in range(classes):
            rivals = [k for k in range(classes) if k != y]
            condition = z3.And([total(e, y, outside) - total(e, k, outside) - sum(owned) >= int(y > k) for k in rivals])
            stays = z3.And([total(f, y, range(views)) >= total(f, k, range(views)) + int(y > k) for k in rivals])
            assert unsatisfiable(condition, *same, z3.Not(stays))
            every = [f[v][k] for v in range(views) for k in range(classes)]
            assert unsatisfiable(z3.Not(condition), z3.ForAll(every, z3.Implies(z3.And([True, *same]), stays)))


def test_the_example_of_the_patchguard_paper():
    """Appendix E: C C W C C W C C W C C, three consecutive corrupted. 8 − 3 < 2·3, yet 6 against 5 at worst."""
    for right, wrong in ((0, 1), (1, 0)):
        votes = torch.zeros(1, 11, 2)
        for view, says in enumerate("CCWCCWCCWCC"):
            votes[0, view, right if says == "C" else wrong] = 1
        windows = torch.tensor([[s <= v < s + 3 for v in range(11)] for s in range(9)])
        location, paper = (rule.certify(votes, windows) for rule in BOTH)
        assert location.label.tolist() == [right]
        assert location.certified.tolist() == [True]
        assert location.margin.min() == 1 + 1 - right  # 6 − 5 − [y > k] + 1
        assert paper.certified.tolist() == [False]
        assert paper.margin[0, 0] == 8 - 3 - 2 * 3 - right + 1


def test_ties_and_silence():
    assert Vote().predict(torch.zeros(2, 5, 4)).tolist() == [0, 0]
    assert Vote().predict(torch.tensor([[[0, 1, 1], [0, 1, 1]]])).tolist() == [1]
    silent = Vote().certify(torch.zeros(1, 3, 2), torch.eye(3).bool())
    assert (silent.label.tolist(), silent.margin.tolist()) == ([0], [[0, 0, 0]])  # one vote for class 1 is enough
    nothing = Vote().certify(torch.zeros(1, 3, 2), torch.zeros(1, 3).bool())
    assert nothing.certified.tolist() == [True]  # nobody sees the patch: nothing changes
    tied = torch.tensor([[[1, 1], [1, 0], [0, 1]]])
    assert Vote().certify(tied, torch.zeros(1, 3).bool()).margin.tolist() == [[1]]
    assert Vote().certify(tied, torch.tensor([[True, False, False]])).margin.tolist() == [[0]]


def test_all_rivals_count_not_only_the_runner_up():
    # Class 2 wins; class 1 is runner-up with 3 votes, class 0 has as many after the attack but wins the tie.
    votes = torch.zeros(1, 9, 3, dtype=torch.int64)
    votes[0, :5, 2] = votes[0, 5:8, 1] = votes[0, 5:8, 0] = 1
    votes[0, 8, 1] = 1  # 4 for class 1, of which one is the attacker's already
    rows = torch.zeros(1, 9, dtype=torch.bool)
    rows[0, 8] = True
    assert Vote().certify(votes, rows).margin.tolist() == [[5 - 3 - 1 - 1 + 1]]


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
          torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_count_the_same_and_never_overflow(dtype):
    votes = torch.zeros(2, 3000, 3, dtype=torch.int64)
    votes[0, :1499, 1] = votes[0, 1499:, 2] = 1  # 1499 against 1501
    votes[1, :, 2] = 1
    sees = torch.zeros(2, 3000).bool()
    sees[1, 2999] = True
    verdict = Vote().certify(votes.to(dtype), sees)
    assert verdict.label.tolist() == [2, 2]
    assert verdict.margin.tolist() == [[2, 0], [3000, 2998]]
    assert (verdict.label.dtype, verdict.margin.dtype) == (torch.int64, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("wrong", [2, 0.5, -1, 256, 257, -255, 2**32 + 1, float("inf"), float("nan"), 1e-7, -1e30])
def test_other_values_are_no_votes(dtype, wrong):
    if not dtype.is_floating_point and (wrong != wrong or wrong != int(max(min(wrong, 1e18), -1e18))):
        return
    try:
        value = torch.tensor(wrong, dtype=torch.float64 if dtype.is_floating_point else torch.int64).to(dtype)
    except (OverflowError, RuntimeError):
        return
    if value.item() in (0, 1):
        return
    votes = torch.zeros(1, 4, 2, dtype=dtype)
    votes[0, 2, 1] = value
    with pytest.raises(ValueError, match=r"votes are 0 or 1|NaN"):
        Vote().predict(votes)
    with pytest.raises(ValueError, match=r"votes are 0 or 1|NaN"):
        Vote().certify(votes, torch.eye(4).bool())


@pytest.mark.parametrize(
    ("votes", "sees", "unsure"),
    [
        ((1, 3, 2), (0, 3), None),
        ((1, 0, 2), (1, 0), None),
        ((1, 3, 1), (1, 3), None),
        ((1, 3, 2), (1, 4), None),
        ((1, 3, 2), (3,), None),
        ((3, 2), (1, 3), None),
        ((1, 3, 2, 1), (1, 3), None),
        ((1, 3, 2), (1, 3), (3,)),
        ((2, 3, 2), (1, 3), (1, 3)),
    ],
)
def test_shapes_that_do_not_fit(votes, sees, unsure):
    doubt = None if unsure is None else torch.zeros(unsure).bool()
    for rule in BOTH:
        with pytest.raises(ValueError):  # noqa: PT011
            rule.certify(torch.zeros(votes), torch.zeros(sees).bool(), doubt)


def test_kinds_that_do_not_fit():
    votes = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="sees must be bool"):
        Vote().certify(votes, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="unsure must be bool"):
        Vote().certify(votes, torch.zeros(1, 3).bool(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="complex"):
        Vote().predict(votes.to(torch.complex64))
    with pytest.raises(ValueError, match="margin"):
        Vote(margin="best")


def test_tensors_of_any_make():
    generator = torch.Generator().manual_seed(0)
    votes = (torch.rand(3, 9, 4, generator=generator) < torch.tensor([0.9, 0.3, 0.2, 0.1])).float()
    sees, unsure = torch.eye(9).bool(), torch.rand(3, 9, generator=generator) < 0.1
    expected = Vote().certify(votes, sees, unsure)
    sparse = votes.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    for e, s, u in (
        (sparse, sees.T.contiguous().T, unsure.T.contiguous().T),
        (votes.repeat(1, 1, 2)[:, :, :4], sees[:1].expand(9, -1) & False | sees, unsure),
    ):
        verdict = Vote().certify(e, s, u)
        assert torch.equal(verdict.margin, expected.margin)
        assert not verdict.margin.requires_grad
    empty = Vote().certify(votes[:0], sees, unsure[:0])
    assert (empty.label.shape, empty.margin.shape, empty.certified.shape) == ((0,), (0, 9), (0,))
    assert isinstance(empty, Verdict)


def test_pictures_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    votes = torch.rand(11, 8, 3, generator=generator) < 0.5
    sees = torch.rand(5, 8, generator=generator) < 0.3
    whole = Vote().certify(votes, sees)
    monkeypatch.setattr("certipatch.rules.vote.CHUNK_BYTES", 16 * 5 * 3 * 2)
    assert torch.equal(Vote().certify(votes, sees).margin, whole.margin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_stay_exact_under_autocast(dtype):
    """In bfloat16 a count of 263 is 264 or 262: enough to certify what an attack breaks."""
    votes = torch.zeros(1, 1600, 2, dtype=torch.uint8)
    votes[0, :1062, 0] = votes[0, 1062:, 1] = 1
    sees = torch.zeros(1, 1600).bool()
    sees[0, :263] = True
    with torch.autocast("cpu", dtype=dtype):
        verdict = Vote().certify(votes, sees)
    assert verdict.margin.tolist() == [[1062 - 263 - 538 - 263 + 1]]
    assert verdict.certified.tolist() == [False]
