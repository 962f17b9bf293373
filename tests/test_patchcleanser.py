"""PatchCleanser and Minority Reports on pictures: the full table as reference, attacks, passes, any resize inside."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import certipatch as cp
from certipatch import evidence as ev
from certipatch import rules
from certipatch.errors import InputError
from certipatch.testing import check_defense
from certipatch.views import MaskPairs, mask_set

SIZE = (12, 12)
THREAT = cp.PatchThreat(3)


class Thirds(nn.Module):
    """Which third of the picture is brightest, with a will of its own: three classes, or four."""

    def __init__(self, classes: int = 3, sharpness: float = 25.0, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3, generator=generator) * 0.2, requires_grad=False)
        self.weight[torch.arange(3), torch.arange(3)] += 1.0
        self.sharpness = sharpness

    def forward(self, x):
        return self.sharpness * F.linear(F.adaptive_avg_pool2d(x.mean(1, keepdim=True), (3, 1)).flatten(1), self.weight)


def pictures(count: int = 9, seed: int = 1, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """A bright third each, less and less clearly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 2, *size, generator=generator) * 0.5
    third = size[0] // 3
    for i in range(count):
        x[i, :, (i % 3) * third : (i % 3 + 1) * third] += 0.4 * (1 - i / count)
    return x.clamp(0, 1)


def full_table(defense, x):
    """Scores under all masks and pairs."""
    size = (x.shape[2], x.shape[3])
    return ev.scores(ev.logits(defense.model, MaskPairs(defense.views_of(size).masks), x))


@pytest.mark.parametrize("all_margins", [True, False])
@pytest.mark.parametrize("gap", [0.0, 0.5])
@pytest.mark.parametrize(
    ("threat", "masks", "stride"),
    [(THREAT, 3, None), (THREAT, (2, 4), None), (cp.PatchThreat((2, 5)), 4, None), (THREAT, None, 2),
     (cp.PatchThreat(2, count=2), (2, 3), None), (cp.PatchThreat(5, shape="line"), 3, None), (cp.PatchThreat(12), 6, None)],
)  # fmt: skip
def test_the_full_table_says_the_same(threat, masks, stride, gap, all_margins):
    x = torch.cat([pictures(), torch.rand(9, 2, *SIZE, generator=torch.Generator().manual_seed(3))])
    defense = cp.PatchCleanser(
        Thirds().eval(), threat, masks=masks, stride=stride, min_mean_gap=gap, all_margins=all_margins
    )
    evidence = defense.evidence(x)
    found = defense.certificate(evidence, threat)
    table = full_table(defense, x)
    relation = defense.relation(threat, SIZE)
    full = rules.DoubleMask(gap).certify(table, relation.rows, error=evidence.error)
    margin = full.margin[:, relation.row_of]
    assert torch.equal(found.label, full.label)
    assert torch.equal(found.certified, full.certified)
    assert torch.equal(defense.predict(x), full.label)
    assert (found.margin <= margin + 1e-6).all()  # float32 in batches of other sizes
    if all_margins:  # every margin of a certified place, and which places are certified
        assert torch.equal(found.margin > 0, margin > 0)
        assert torch.allclose(found.margin[margin > 0], margin[margin > 0], rtol=0, atol=1e-6)
    known = ~evidence.unsure
    assert torch.allclose(evidence.values[known], table[known], rtol=0, atol=1e-6)
    assert torch.equal(evidence.passes, known.sum(1))
    assert (evidence.passes <= table.shape[1]).all()


@pytest.mark.slow
def test_certificates_hold_against_pasted_patches():
    x = pictures()
    for all_margins in (True, False):
        tried = check_defense(
            cp.PatchCleanser(Thirds().eval(), THREAT, masks=3, all_margins=all_margins), x, THREAT, slack=1e-5, trials=8
        )
        assert tried.certified > 100
        assert tried.changed > 10
    tried = check_defense(cp.MinorityReports(Thirds().eval(), THREAT, masks=3), x, THREAT, slack=1e-5, trials=8)
    assert tried.certified > 100
    tried = check_defense(
        cp.PatchCleanser(Thirds().eval(), THREAT, masks=3, min_mean_gap=0.5), x, THREAT, slack=1e-5, trials=8
    )
    assert tried.certified > 50
    one = cp.PatchThreat(1)
    check_defense(cp.PatchCleanser(Thirds().eval(), one, masks=4), x[:4], one, slack=1e-5, trials=40)


def test_the_alarm_of_minority_reports():
    """Corners too: a picture is certified only where a mask over the corner leaves the same answer."""
    x = pictures()[[0, 2]]
    defense = cp.MinorityReports(Thirds().eval(), THREAT, masks=4, threshold=0.4)
    found = defense.certify(x, THREAT)
    assert found.notion == "detection"
    assert found.certified.tolist() == [True, True]
    relation = defense.relation(THREAT, SIZE)
    assert not relation.rows[:, 1:].all(1).any()
    assert relation.rows[:, 0].all()
    torch.manual_seed(0)
    for corner in ((0, 0), (0, 9), (9, 0), (9, 9)):
        attacked = x.repeat(20, 1, 1, 1)
        attacked[:, :, corner[0] : corner[0] + 3, corner[1] : corner[1] + 3] = torch.rand(40, 2, 3, 3).round()
        again = defense.certify(attacked, THREAT)
        assert (again.alarm | (again.label == found.label.repeat(20))).all()
    shaky = cp.MinorityReports(Thirds(sharpness=2.0).eval(), THREAT, masks=4, threshold=0.9).certify(x, THREAT)
    assert not shaky.certified.any()


class Resized(nn.Module):
    """Bicubic upsampling inside, then a network: what a patch touches is larger than itself."""

    def __init__(self, side: int):
        super().__init__()
        torch.manual_seed(3)
        self.side = side
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 4)
        )
        self.net[-1].weight.data *= 40

    def forward(self, x):
        return self.net(F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True))


def test_no_native_pixel_escapes_a_resize_inside():
    """32 → 224: whatever is painted on 5×5 native pixels, no masked picture of a covering mask changes in any bit."""
    threat, generator = cp.PatchThreat(5), torch.Generator().manual_seed(0)
    model = Resized(224).eval()
    smooth = F.interpolate(torch.rand(6, 3, 4, 4, generator=generator), (32, 32), mode="bilinear")
    defense = cp.PatchCleanser(model, threat, masks=2)
    found = defense.certify(smooth, threat)
    picture = int(found.margin.gt(0).sum(1).argmax())
    places = (found.margin[picture] > 0).nonzero().flatten()
    assert len(places) > 20
    masks = defense.views_of((32, 32)).masks
    for place in places[torch.linspace(0, len(places) - 1, 6).long()].tolist():
        top, left, height, width = found.box(place)
        attacked = smooth[picture].repeat(4, 1, 1, 1)
        paint = torch.rand(4, 3, height, width, generator=generator).round()
        attacked[:, :, top : top + height, left : left + width] = paint
        assert (defense.predict(attacked) == found.label[picture]).all()
        covering = next(m for m in masks if m[top : top + height, left : left + width].all())
        shown = [torch.where(covering, torch.tensor(0.5), x) for x in (smooth[picture : picture + 1], attacked)]
        assert torch.equal(shown[0].expand_as(shown[1]), shown[1])
    upsampled = [
        F.interpolate(x, (224, 224), mode="bicubic", antialias=True) for x in (smooth[picture : picture + 1], attacked)
    ]
    assert (upsampled[0] != upsampled[1]).any(1)[0].sum() > 36**2  # the patch's reach after the resize: more than 35x35


def test_passes():
    """Few on pictures that are not certified; all pairs on those that are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)).eval()
    net[-1].weight.data *= 8
    x = torch.rand(60, 2, *SIZE)
    quick = cp.PatchCleanser(net, THREAT, masks=6, all_margins=False)
    found, evidence = quick.certify(x, THREAT), quick.evidence(x)
    open_ = ~found.certified
    assert open_.sum() > 20
    assert evidence.passes[open_].double().mean() < quick.number_of_views(SIZE) / 5
    clear = cp.PatchCleanser(Thirds().eval(), THREAT, masks=6, all_margins=False)
    evidence = clear.evidence(pictures()[[0, 2]])
    assert clear.certificate(evidence, THREAT).certified.all()
    assert evidence.passes.tolist() == [325] * 2
    asked = []
    handle = clear.model.register_forward_hook(lambda _module, given, _answer: asked.append(len(given[0])))
    clear.evidence(pictures()[[0, 2]])
    assert len(set(asked)) == 1  # passes of one shape, the last of each round filled up
    assert 2 * 325 <= sum(asked) < 2 * 325 + 12 * asked[0]
    asked.clear()
    clear.predict(pictures()[[0, 2]])
    assert 2 * 25 <= sum(asked) < 2 * 25 + asked[0]
    handle.remove()


def test_answers_do_not_depend_on_the_batch():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 3)).eval()
    net[-1].weight.data *= 4
    x = torch.rand(16, 2, *SIZE)
    for all_margins in (True, False):
        defense = cp.PatchCleanser(net, THREAT, masks=4, all_margins=all_margins)
        whole = defense.certify(x, THREAT)
        for i in range(len(x)):
            alone = defense.certify(x[i : i + 1], THREAT)
            assert alone.label[0] == whole.label[i]
            assert torch.allclose(alone.margin[0], whole.margin[i], rtol=0, atol=1e-5)
        small = cp.PatchCleanser(net, THREAT, masks=4, all_margins=all_margins, batch_size=7).certify(x, THREAT)
        assert torch.equal(small.label, whole.label)
        assert torch.equal(small.certified, whole.certified)


def test_other_threats_keep_the_label():
    x = pictures()
    defense = cp.PatchCleanser(Thirds().eval(), THREAT, masks=3)
    label = defense.predict(x)
    larger = defense.certify(x, cp.PatchThreat(8))
    assert torch.equal(larger.label, label)
    assert (larger.margin == -math.inf).all()  # no mask covers it
    for smaller in (cp.PatchThreat(2), cp.SparseThreat(1)):
        found = defense.certify(x, smaller)
        assert torch.equal(found.label, label)
        assert (found.margin.amin(1) >= defense.certify(x, THREAT).margin.amin(1)).all()


def test_a_patch_as_large_as_the_picture():
    defense = cp.PatchCleanser(Thirds().eval(), cp.PatchThreat(12), masks=6)
    found = defense.certify(pictures(), cp.PatchThreat(12))
    assert defense.number_of_views(SIZE) == 1  # everything is hidden: one answer to all pictures
    assert len(found.label.unique()) == 1
    assert found.margin.shape == (9, 1)
    with pytest.raises(InputError, match="does not fit"):
        cp.PatchCleanser(Thirds().eval(), cp.PatchThreat(13)).predict(pictures())


@pytest.mark.slow
def test_pictures_that_are_not_square_and_several_threats():
    x = pictures(6, size=(9, 20))
    flat, tall = cp.PatchThreat((2, 6)), cp.PatchThreat((6, 2))
    defense = cp.PatchCleanser(Thirds().eval(), [flat, tall], masks=2)
    for threat in (flat, tall):
        tried = check_defense(defense, x, threat, slack=1e-5, trials=6)
        assert tried.certified > 0
    assert isinstance(defense.settings()["threat"], list)


def test_own_masks_are_checked():
    x = pictures(3)
    good = mask_set([THREAT], SIZE, (3, 3))
    own, made = (cp.PatchCleanser(Thirds().eval(), THREAT, masks=m).certify(x, THREAT) for m in (good, 3))
    assert torch.equal(own.margin, made.margin)
    with pytest.raises(InputError, match="mask set does not cover 3×3 patches everywhere in pictures of 12×12"):
        cp.PatchCleanser(Thirds().eval(), THREAT, masks=good[1:]).predict(x)
    with pytest.raises(InputError, match=r"does not cover 3×3 patches.*use k ≥ 5"):
        cp.PatchCleanser(Thirds().eval(), THREAT, masks=3, stride=2).predict(x)


class Standardised(nn.Module):
    """Standardises each picture, or the whole batch."""

    def __init__(self, batch: bool):
        super().__init__()
        self.net, self.dims = Thirds(), (0, 1, 2, 3) if batch else (1, 2, 3)

    def forward(self, x):
        return self.net((x - x.mean(self.dims, keepdim=True)) / (x.std(self.dims, keepdim=True) + 1e-3) / 5)


class Leaky(nn.Module):
    """Standardises before it cuts its own views."""

    encoding = "all-views"

    def forward(self, x):
        return x


@pytest.mark.slow
def test_models_that_break_the_conditions():
    x = pictures()
    norm = nn.Sequential(nn.BatchNorm2d(2), Thirds())
    before = norm[0].running_mean.clone()
    with pytest.raises(InputError, match=r"refused.*training mode, call model\.eval"):
        cp.PatchCleanser(norm, THREAT, masks=3).certify(x, THREAT)
    assert torch.equal(norm[0].running_mean, before)
    assert cp.PatchCleanser(norm.eval(), THREAT, masks=3).certify(x, THREAT).certified.any()
    with pytest.raises(InputError, match="depends on the other pictures in the batch"):
        cp.PatchCleanser(Standardised(batch=True).eval(), THREAT, masks=3).certify(x, THREAT)
    noisy = nn.Sequential(nn.Dropout(0.5), Thirds())
    with pytest.raises(InputError, match="two answers"):
        cp.PatchCleanser(noisy, THREAT, masks=3).certify(x, THREAT)
    for defense in (cp.PatchCleanser, cp.MinorityReports):
        with pytest.raises(InputError, match="reads all-views"):
            defense(Leaky().eval(), THREAT)
    # Masks come first: a standardisation of single pictures sees no hidden pixel, and its certificates hold.
    tried = check_defense(
        cp.PatchCleanser(Standardised(batch=False).eval(), THREAT, masks=3), x, THREAT, slack=1e-4, trials=6
    )
    assert tried.certified > 0


def test_fills():
    x, seen = pictures(2), []

    class Watched(nn.Module):
        fill = (0.25, 0.75)

        def forward(self, pictures):
            seen.append(pictures.clone())
            return pictures.mean((2, 3)) * torch.tensor([1.0, 2.0])

    defense = cp.PatchCleanser(Watched().eval(), THREAT, masks=2)
    defense.predict(x)
    masks = defense.views_of(SIZE).masks
    assert torch.equal(seen[-1][0][:, masks[0]], torch.tensor([[0.25], [0.75]]).expand(2, int(masks[0].sum())))
    assert torch.equal(seen[-1][0][:, ~masks[0]], x[0][:, ~masks[0]])
    assert defense.settings()["fill"] == [0.25, 0.75]
    cp.PatchCleanser(Watched().eval(), THREAT, masks=2, fill=1.0).predict(x)
    assert (seen[-1][0][:, masks[0]] == 1).all()
    with pytest.raises(InputError, match="channels"):
        cp.PatchCleanser(Watched().eval(), THREAT, masks=2, fill=(0.1, 0.2, 0.3)).predict(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": 0}, "masks are"),
        ({"masks": (2, 3, 4)}, "masks are"),
        ({"masks": True}, "masks are"),
        ({"stride": -1}, "stride are"),
        ({"fill": 1.5}, "fill is"),
        ({"fill": "grey"}, "fill is"),
        ({"threat": cp.SparseThreat(3)}, "patch threat"),
        ({"threat": []}, "patch threat"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(InputError, match=message):
        cp.PatchCleanser(Thirds().eval(), **({"threat": THREAT} | settings))


def test_pictures_that_do_not_fit():
    defense = cp.PatchCleanser(Thirds().eval(), THREAT)
    for wrong in (torch.zeros(0, 2, 12, 12), torch.zeros(1, 2, 12, 12).long(), torch.full((1, 2, 12, 12), 1.5)):
        with pytest.raises(InputError):
            defense.certify(wrong, THREAT)
    with pytest.raises(InputError, match="finite"):
        cp.PatchCleanser(nn.Sequential(Thirds(sharpness=math.inf)).eval(), THREAT).certify(pictures(), THREAT)


def test_settings_are_plain_values():
    for made in (cp.PatchCleanser, cp.MinorityReports):
        assert json.dumps(made(Thirds().eval(), THREAT, masks=(2, 4)).settings())


@pytest.mark.parametrize("gap", [-0.1, 1.0, math.nan, True, "0.3"])
def test_min_mean_gap_is_a_gap(gap):
    with pytest.raises(InputError, match="min_mean_gap is a gap in confidence"):
        cp.PatchCleanser(Thirds().eval(), THREAT, min_mean_gap=gap)


def test_a_mask_of_small_mean_gap_does_not_win():
    """Masks hide a dim bright spot: what is left is answered otherwise under all second masks, with a small lead."""
    x = torch.full((1, 2, *SIZE), 0.3)
    x[:, :, 1:3, 1:3] = 0.9  # makes the first third the brightest
    x[:, :, 8:, :] = 0.302
    network = Thirds(sharpness=25.0)
    network.weight.copy_(torch.eye(3))
    paper, asks = (cp.PatchCleanser(network.eval(), THREAT, masks=3, fill=0.3, min_mean_gap=gap) for gap in (0.0, 0.3))
    assert paper.predict(x).tolist() == [2]
    assert asks.predict(x).tolist() == [0]
    assert "mean gap of 0.3" in asks.theorem
    for defense in (paper, asks):
        assert not defense.certify(x, THREAT).certified.any()
