"""PatchCleanser with masks of two sizes: the table of the finer ones as reference, an exhaustive adversary, refusals."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_patchcleanser import SIZE, THREAT, Thirds, pictures

import certipatch as cp
from certipatch import evidence as ev
from certipatch import rules
from certipatch.defenses.double_masking import LargerMasks, MultiScaleTable, merge_sizes
from certipatch.errors import InputError
from certipatch.export import AsGraph
from certipatch.rules.double_mask import top2_gap
from certipatch.testing import check_defense
from certipatch.views import MaskPairs, mask_set
from certipatch.views.masks import axis_masks, enclosing_pair, pair_table, prime_divisions


def looked_at(defense, x):
    """The table of pairs of the smallest masks, cell by cell: what the largest say confidently that hide as much."""
    size = (x.shape[2], x.shape[3])
    sizes = [
        mask_set([THREAT], size, defense.masks, None, defense.divisions[:n]) for n in range(len(defense.divisions) + 1)
    ]
    said = [ev.scores(ev.logits(defense.model, MaskPairs(masks), x)) for masks in sizes]
    found, table = said[-1], pair_table(len(sizes[-1]))
    of = list(range(len(sizes[-1])))  # the mask of each size that holds each of the smallest
    for n, (masks, scores, exit_gap) in reversed(list(enumerate(zip(sizes, said, defense.exit_gaps, strict=False)))):
        parent = [next(i for i, one in enumerate(masks) if not (mask & ~one).any()) for mask in sizes[n + 1]]
        of = [parent[i] for i in of]
        for a, b in itertools.combinations_with_replacement(range(len(of)), 2):
            first = scores[:, pair_table(len(masks))[of[a], of[b]]]
            found[:, table[a, b]] = torch.where((top2_gap(first) >= exit_gap)[:, None], first, found[:, table[a, b]])
    return found


@pytest.mark.parametrize("all_margins", [True, False])
@pytest.mark.parametrize(
    ("masks", "subdivisions", "exit_gap", "gap"),
    [(2, 2, 0.3, 0.0), ((1, 2), (5, 2), 0.9, 0.2), (3, 1, 0.5, 0.0), (2, 3, 0.0, 0.0), (1, 4, (0.8, 0.4), 0.1)],
)
def test_cell_by_cell(masks, subdivisions, exit_gap, gap, all_margins):
    x = torch.cat([pictures(), torch.rand(9, 2, *SIZE, generator=torch.Generator().manual_seed(3))])
    network = Thirds(sharpness=8.0).eval()
    defense = cp.PatchCleanser(
        network,
        THREAT,
        masks=masks,
        subdivisions=subdivisions,
        exit_gap=exit_gap,
        min_mean_gap=gap,
        all_margins=all_margins,
    )
    evidence = defense.evidence(x)
    found, table = defense.certificate(evidence, THREAT), looked_at(defense, x)
    relation = defense.relation(THREAT, SIZE)
    full = rules.DoubleMask(gap).certify(table, relation.rows, error=evidence.error)
    assert torch.equal(found.label, full.label)
    assert torch.equal(defense.predict(x), full.label)
    assert torch.equal(found.certified, full.certified)
    assert found.certified.any()
    known = ~evidence.unsure
    assert torch.allclose(evidence.values[known], table[known], rtol=0, atol=1e-6)
    if all_margins:
        margin = full.margin[:, relation.row_of]
        assert torch.equal(found.margin > 0, margin > 0)
    assert (evidence.passes <= defense.forward_passes(SIZE)).all()
    if exit_gap == 0.0:  # the larger ones alone decide
        assert (evidence.passes <= defense.sizes(SIZE)[0].number(SIZE)).all()


@pytest.mark.slow
def test_certificates_hold_against_pasted_patches():
    network = Thirds(sharpness=8.0).eval()
    for all_margins, subdivisions, exit_gap in ((True, 2, 0.2), (False, 2, 0.9), (True, 4, (0.8, 0.5))):
        defense = cp.PatchCleanser(
            network, THREAT, masks=2, subdivisions=subdivisions, exit_gap=exit_gap, all_margins=all_margins
        )
        tried = check_defense(defense, pictures(), THREAT, slack=1e-5, trials=8)
        assert tried.certified > 50
        assert tried.changed > 10


def test_finer_masks_certify_what_larger_ones_do_not():
    x, network = pictures(18), Thirds(sharpness=8.0).eval()
    certified = {}
    for subdivisions in (None, 5):
        defense = cp.PatchCleanser(network, THREAT, masks=2, subdivisions=subdivisions, exit_gap=0.5)
        certified[subdivisions] = defense.certify(x, THREAT).certified.sum()
    assert certified[5] > certified[None]


class AtTheLimit(torch.nn.Module):
    """Leads ``exit_gap`` by ``off`` where everything is hidden, and says another class where something is to be seen."""

    def __init__(self, off: float):
        super().__init__()
        self.off = off

    def forward(self, x):
        hidden = (x == 0.5).float().mean((1, 2, 3))  # of pictures that have no such pixel
        lead = torch.where(hidden > 0.99, 0.5 + self.off, -0.9)
        first = (1 + lead) / 2
        return torch.stack([first, 1 - first], 1).log()


@pytest.mark.parametrize(("off", "label", "certified"), [(-1e-3, 1, True), (0.0, None, False), (1e-3, 0, True)])
def test_within_rounding_of_the_exit_gap_nothing_is_claimed(off, label, certified):
    x = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    defense = cp.PatchCleanser(AtTheLimit(off).eval(), THREAT, masks=1, subdivisions=2, exit_gap=0.5, all_margins=True)
    found = defense.certify(x, THREAT)
    assert found.certified.item() == certified
    assert label in (None, found.label.item())  # at the limit rounding may take either, and nothing is claimed


@pytest.mark.parametrize(
    ("largest", "larger", "smallest", "held", "least"),
    [
        (0.45, 0.25, 0.9, 0.9, 0.25),  # all little below their limits: each might count
        (0.45, -0.25, 0.9, 0.9, None),
        (0.45, 0.05, 0.9, 0.9, 0.45),  # the second is far below
        (0.55, 0.25, 0.9, 0.55, 0.25),  # the largest count, but the others might
        (0.55, 0.25, -0.9, 0.55, None),
        (0.55, -0.9, 0.9, 0.55, None),  # the second count where the largest do not, so the smallest never do
        (0.55, 0.9, -0.9, 0.55, 0.55),
        (0.75, -0.9, -0.9, 0.75, 0.75),  # the largest count for sure
        (0.2, 0.35, 0.15, 0.35, None),  # its gap might be no more than rounding
        (0.2, 0.35, 0.25, 0.35, 0.25),
        (0.2, 0.05, 0.15, 0.15, 0.15),
        (-0.2, -0.05, 0.9, 0.9, 0.9),
    ],
)
def test_a_cell_certifies_with_the_least_gap_that_rounding_may_give_it(largest, larger, smallest, held, least):
    """Rounding of 0.1 in a score, 0.2 in a gap; of two classes the first leads by so much under masks of each size."""
    x = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    given = {"masks": 1, "subdivisions": 4, "exit_gap": (0.5, 0.3), "min_mean_gap": 0.01}
    defense = cp.PatchCleanser(Thirds().eval(), THREAT, **given)
    error = torch.tensor([0.1], dtype=torch.float64)
    arguments = defense.rule(SIZE), defense.views_of(SIZE), defense.model, x, error, None, defense.larger(SIZE)
    table = MultiScaleTable(*arguments)
    scores = iter([(1 + torch.tensor([lead, -lead])) / 2 for lead in (largest, larger, smallest)])
    table.predict_views = lambda network, pairs, image, view: next(scores).expand(len(view), 2)
    table.ensure_predicted(torch.ones_like(table.known))
    evidence = table.evidence()
    assert table.known.all()
    assert evidence.labels is None or (evidence.labels == 0).all()
    assert bool(evidence.unsure.any()) == bool(evidence.unsure.all()) == (least is None)
    torch.testing.assert_close(top2_gap(table.scores), torch.full_like(table.gaps, held), atol=1e-5, rtol=0)
    if least is not None:
        torch.testing.assert_close(top2_gap(evidence.values), torch.full_like(table.gaps, least), atol=1e-5, rtol=0)
    assert (evidence.values.argmax(2) == 0).all()
    assert (table.predicted == 0).all()
    holds = table.unrefuted(torch.zeros(1, 1, dtype=torch.int64))
    assert bool(holds.all()) == bool(holds.any()) == (least is not None and least > 0.21)


class ByTheMasks(torch.nn.Module):
    """Answers by what is hidden: class 1 in general, class 2 under single masks of the second size, or where white is seen;
    where white is seen under one of the largest masks, undecided."""

    encoding, fill = "picture", 0.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.largest = self.second = torch.zeros(0)

    def forward(self, x):
        hidden, white = (x[:, 0] == 0).flatten(1), (x[:, 0] > 0.9).flatten(1).any(1)
        largest, second = ((hidden[:, None] == of.flatten(1)).all(2).any(1) for of in (self.largest, self.second))
        said = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.5, 0.0]])
        return said[torch.where(white & largest, 2, torch.where((second & ~largest) | white, 1, 0))]


@pytest.mark.slow
@pytest.mark.parametrize("threats", [[cp.PatchThreat(2), cp.PatchThreat((1, 4))],
                                     [cp.PatchThreat((2, 3)), cp.PatchThreat((3, 2))],
                                     [cp.PatchThreat(3, shape="line")]])  # fmt: skip
def test_a_cell_is_filled_alike_in_whatever_order_cells_are_asked_for(threats):
    """What an attacker makes the defense look at must not fill cells of a row that he cannot touch."""
    size, network = (16, 16), ByTheMasks().eval()
    defense = cp.PatchCleanser(network, threats, masks=2, subdivisions=4, exit_gap=0.5)
    network.largest, network.second = (pairs.masks for pairs, _, _ in defense.larger(size))
    x = torch.full((1, 1, *size), 0.5)
    for threat in threats:
        places, found = threat.locations(size), defense.certify(x, threat)
        patches = torch.stack([places.pixels(place) for place in range(len(places))])
        certified, attacked = found.margin[0] > 0, torch.where(patches[:, None], 1.0, x)
        assert (defense.predict(attacked)[certified] == found.label).all()
    for (_, first, _), (_, second, _) in itertools.pairwise(defense.larger(size)):
        assert all(len(first[second == one].unique()) == 1 for one in second.unique())


class Undecided(torch.nn.Module):
    """Says class 2 surely, but nothing at all where only the lower half is to be seen."""

    encoding, fill = "picture", 0.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x):
        upper, lower = (x[:, 0, row].sum(1) > 0 for row in (0, -1))
        return torch.tensor([0.0, 0.0, 9.0]) * (upper | ~lower).float()[:, None]


@pytest.mark.parametrize("exit_gap", [0.0, 1e-8, 1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("fallback", ["majority", "unmasked"])
def test_answers_without_any_lead_claim_nothing(exit_gap, fallback):
    x, threat = torch.full((1, 1, 8, 8), 0.5), cp.PatchThreat(2)
    x[:, :, 6:] = 0
    defense = cp.PatchCleanser(
        Undecided().eval(), threat, masks=(2, 1), subdivisions=(1, 2), exit_gap=exit_gap, fallback=fallback
    )
    places, found = threat.locations((8, 8)), defense.certify(x, threat)
    assert torch.equal(found.label, defense.predict(x))
    patches = torch.stack([places.pixels(place) for place in range(len(places))])
    answers = defense.predict(torch.where(patches[:, None], 1.0, x))
    assert (answers[found.margin[0] > 0] == found.label).all()


class LeadsBy(torch.nn.Module):
    """Two classes: under the one largest mask the second leads by ``large``, else by ``small``; where white is seen the first."""

    encoding, fill = "picture", 0.0

    def __init__(self, large: float, small: float):
        super().__init__()
        self.large, self.small, self.unmasked = large, small, torch.nn.Flatten()
        self.unmasked.forward = lambda x: self.seen(x)

    def seen(self, x):
        return torch.tensor([[0.0, 9.0], [9.0, 0.0]])[(x > 0.9).flatten(1).any(1).long()]

    def forward(self, x):
        lead = torch.where((x == 0).flatten(1).all(1), self.large, self.small)
        said = torch.stack([(1 - lead) / 2, (1 + lead) / 2], 1).log()
        return torch.where((x > 0.9).flatten(1).any(1)[:, None], self.seen(x), said)


@pytest.mark.slow
@pytest.mark.parametrize("small", [0.12, 0.4])
def test_whether_a_mask_may_win_does_not_depend_on_rounding(small):
    """Rounding of 0.05 in a score: a lead of 0.61 in the clean picture is one of 0.51 in the attacked one, and back."""
    x = torch.full((1, 1, 8, 8), 0.5)
    attacked = x.clone()
    attacked[..., :2, :2] = 1.0
    leads = [0.45, 0.49, 0.5, 0.51, 0.55, 0.59, 0.6, 0.61, 0.65]
    made, given = {}, {"masks": 1, "subdivisions": 2, "exit_gap": 0.5, "min_mean_gap": 0.3, "fallback": "unmasked"}
    for large in leads:
        made[large] = cp.PatchCleanser(LeadsBy(large, small).eval(), cp.PatchThreat(2), **given)
        made[large].tolerance = lambda images: ev.Tolerance(0.05, 0.0)
    certified = 0
    for clean, after in itertools.product(leads, leads):
        found = made[clean].certify(x, cp.PatchThreat(2))
        assert torch.equal(found.label, made[clean].predict(x))
        if abs(clean - after) <= 0.1 and found.margin[0, 0] > 0:
            certified += 1
            assert torch.equal(made[after].predict(attacked), found.label)
    assert certified > 10
    exact = [AsGraph(made[large], (8, 8), 1)(attacked)[0] for large in leads]
    assert torch.cat(exact).tolist() == [made[large].predict(attacked).item() for large in leads]


@given(st.integers(0, 2**32))
def test_an_attacker_who_owns_all_but_one_row_does_not_change_the_answer(seed):
    """All that a patch under one finer mask can touch is repainted at random, in both tables, for small sets of masks."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.tensor([0, 0, 1, 1])
    larger, finer = pair_table(2), pair_table(4)
    first, second = torch.triu_indices(4, 4)
    up = larger[of[first], of[second]]

    larger_masks = LargerMasks(MaskPairs(torch.eye(2, dtype=torch.bool)[:, None]), up, 0.3)

    def blended(coarse, fine):
        return merge_sizes(fine, [(coarse, larger_masks)])

    def drawn(count, views):
        scores = torch.rand(count, views, 3, generator=generator, dtype=torch.float64) ** 2
        scores[..., 0] += torch.rand(count, 1, generator=generator, dtype=torch.float64)
        return scores / scores.sum(-1, keepdim=True)

    coarse, fine = drawn(1, 3), drawn(1, 10)
    row = int(torch.randint(4, (1,), generator=generator))
    sees = torch.ones(1, 10, dtype=torch.bool)
    sees[0, finer[row]] = False
    verdict = rules.DoubleMask().certify(blended(coarse, fine), sees)
    if not verdict.certified.item():
        return
    other_coarse, other_fine = drawn(300, 3), drawn(300, 10)
    for kept, mine, theirs in ((larger[of[row]], coarse, other_coarse), (finer[row], fine, other_fine)):
        theirs[:, kept] = mine[:, kept]
    assert (rules.DoubleMask().predict(blended(other_coarse, other_fine)) == verdict.label).all()


def test_what_is_within():
    for threats in ([THREAT], [cp.PatchThreat((2, 5)), THREAT], [cp.PatchThreat(2, count=2)]):
        larger, smaller = (mask_set(threats, SIZE, (2, 3), None, parts) for parts in ([], [(2, 3)]))
        table = enclosing_pair(smaller, larger)
        pairs, hidden = MaskPairs(smaller), ~MaskPairs(larger).visible(SIZE, table)
        assert not (~pairs.visible(SIZE) & ~hidden).any()
        if len(larger) == 6:
            assert len(table.unique()) == len(larger) * (len(larger) + 1) // 2
            assert smaller.sum((1, 2)).max() < larger.sum((1, 2)).min()


@given(st.integers(1, 40), st.data())
def test_parts_cover_what_a_mask_covers(length, data):
    patch, parts = data.draw(st.integers(1, length)), data.draw(st.lists(st.integers(1, 4), max_size=3))
    masks = data.draw(st.integers(1, 8))
    whole, starts = axis_masks(length, patch, masks)
    width, inner = axis_masks(length, patch, masks, None, parts)
    assert all(any(t <= place and place + patch <= t + width for t in inner) for place in range(length - patch + 1))
    assert all(any(t <= i and i + width <= t + whole for t in starts) for i in inner)
    assert len(inner) <= math.prod(parts) * len(starts)


def test_refusals_and_settings():
    network = Thirds().eval()
    with pytest.raises(InputError, match="give their number as masks"):
        cp.PatchCleanser(network, THREAT, masks=mask_set([THREAT], SIZE), subdivisions=2)
    with pytest.raises(InputError, match="exit_gap is a gap in confidence"):
        cp.PatchCleanser(network, THREAT, masks=2, subdivisions=2, exit_gap=1.0)
    with pytest.raises(InputError, match="subdivisions are a whole number"):
        cp.PatchCleanser(network, THREAT, subdivisions=0)
    with pytest.raises(InputError, match="one for each of 2 larger sizes"):
        cp.PatchCleanser(network, THREAT, masks=2, subdivisions=4, exit_gap=[0.5])
    assert prime_divisions((4, 2)) == [(2, 2), (2, 1)]
    assert prime_divisions((1, 6)) == [(1, 2), (1, 3)]
    settings = cp.PatchCleanser(network, THREAT, masks=2, subdivisions=4).settings()
    assert (settings["subdivisions"], settings["exit_gap"]) == ([4, 4], [0.5, 0.5])
    assert "subdivisions" not in cp.PatchCleanser(network, THREAT, masks=2).settings()
