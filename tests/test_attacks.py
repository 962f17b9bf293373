"""Attacks: exact on networks whose optimum is known, within the threat always, and decided by the defense's own answer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import certipatch as cp
from certipatch.attacks import ATTACKS, Places, Task, Victim, find
from certipatch.attacks.clean_views import CleanViews
from certipatch.attacks.locate import coarse_to_fine
from certipatch.attacks.universal import poses, worn
from certipatch.certificate import Certificate
from certipatch.defenses import Undefended
from certipatch.errors import InputError
from certipatch.rules import (
    ClippedSum,
    DoubleMask,
    MaskedDetection,
    Median,
    MinorityReports,
    RobustMask,
    TrimmedMean,
    Vote,
    Windows,
)
from certipatch.rules.soft import soft_votes
from certipatch.threats import PatchThreat, SparseThreat
from certipatch.views import Blocks, Columns, Cross, Rows
from certipatch.views.incidence import sees

SIZE = (6, 7)


class Linear(nn.Module):
    """logits = W x + b over the pixels: the best patch is known."""

    encoding = "picture"

    def __init__(self, classes: int = 3, seed: int = 0, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(scale * torch.randn(classes, 1, *SIZE, generator=generator), requires_grad=False)

    def forward(self, pictures):
        return torch.einsum("nchw,kchw->nk", pictures, self.weight)


def linear(**options) -> Undefended:
    return Undefended(Linear(**options).eval())


def pictures(number: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.rand((number, 1, *SIZE), generator=torch.Generator().manual_seed(seed))


def task(defense, threat, images=None, **options) -> Task:
    images = pictures() if images is None else images
    label = defense.predict(images)
    usual = {"starts": 3, "steps": 12, "step": 0.2, "search": "random"}
    return Task(images, label, threat, list(range(len(images))), **(usual | options))


def best_leads(defense, images, label, places: Places) -> torch.Tensor:
    """(B, L): the largest lead of a wrong class that any patch at each place can give a linear network; exact."""
    weight, found = defense.model.weight, []
    for image, own in zip(images, label.tolist(), strict=True):
        logits, rows = defense.model(image[None])[0], []
        for rival in (k for k in range(len(weight)) if k != own):
            slope = weight[rival] - weight[own]
            gain = torch.maximum(slope * (1 - image), -slope * image).sum(0)
            rows.append(logits[rival] - logits[own] + places.sums(gain[None])[0])
        found.append(torch.stack(rows).amax(0))
    return torch.stack(found)


@pytest.mark.parametrize(
    "threat",
    [
        PatchThreat(2),
        PatchThreat((1, 4)),
        PatchThreat(5, shape="diamond"),
        PatchThreat(3, shape="line"),
        PatchThreat(2, where="corners"),
        PatchThreat(2, count=2),
    ],
    ids=str,
)
def test_places_are_those_of_the_threat(threat):
    places = Places(threat, SIZE)
    locations = threat.locations(SIZE)
    every = torch.arange(len(places))[:, None]
    masks = places.masks(every)[:, 0]
    assert len(places) == len(locations)
    assert all(torch.equal(masks[i], locations.pixels(i)) for i in range(len(places)))
    assert masks[:, -1].any()
    assert masks[:, :, -1].any()
    values = torch.rand(2, *SIZE)
    expected = (values[:, None] * masks).sum((2, 3))
    assert torch.allclose(places.sums(values), expected, atol=1e-6)
    drawn = places.draw(len(places) + 3, torch.Generator().manual_seed(0))
    if threat.count == 1:
        assert set(drawn[: len(places), 0].tolist()) == set(range(len(places)))
    pair = places.masks(torch.tensor([[0, len(places) - 1]]))[0, 0]
    assert torch.equal(pair, masks[0] | masks[-1])


def test_patch_pgd_breaks_a_linear_network_exactly_where_a_patch_can():
    defense, threat = linear(scale=0.4), PatchThreat(2)
    images = pictures(12)
    asked = task(defense, threat, images, search="exhaustive", steps=8)
    outcome = find("patch-pgd").run(Victim(defense), asked)
    exact = best_leads(defense, images, asked.label, Places(threat, SIZE))
    assert torch.equal(outcome.broken, (exact > 0).any(1))
    assert 0 < outcome.broken.sum() < len(images)  # both happen
    standing = ~outcome.broken
    assert torch.allclose(outcome.loss[standing], exact[standing].amax(1), atol=1e-4)
    assert all(len(outcome.tried[b]) == exact.shape[1] for b in standing.nonzero().flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coarse_to_fine_finds_the_best_place_of_a_linear_network(dtype):
    defense, threat = linear(classes=2), PatchThreat(2)
    defense.model.to(dtype)
    asked = task(defense, threat, pictures().to(dtype))
    places = Places(threat, SIZE)
    order = coarse_to_fine(Victim(defense), asked, places, len(places))
    exact = best_leads(defense, asked.images, asked.label, places)
    assert torch.equal(order[:, 0], exact.argmax(1))
    assert all(len(row.unique()) == len(places) for row in order)


def test_sparse_takes_the_best_pixels_of_a_linear_network():
    defense = linear(classes=2, scale=0.4)
    asked = task(defense, SparseThreat(3), pictures(12), steps=20)
    outcome = find("sparse").run(Victim(defense), asked)
    slope = defense.model.weight[1] - defense.model.weight[0]
    slope = torch.where(asked.label.view(-1, 1, 1, 1) == 0, slope, -slope)
    gain = torch.maximum(slope * (1 - asked.images), -slope * asked.images).flatten(1).topk(3, 1).values.sum(1)
    logits = defense.model(asked.images)
    lead = logits.gather(1, 1 - asked.label[:, None])[:, 0] - logits.gather(1, asked.label[:, None])[:, 0]
    assert torch.equal(outcome.broken, lead + gain > 0)
    assert 0 < outcome.broken.sum() < len(asked.images)
    assert ((outcome.attacked != asked.images).any(1).flatten(1).sum(1) <= 3).all()


def test_linf_stays_in_its_ball_and_is_exact_on_a_linear_network():
    defense = linear(classes=2)
    images = 0.2 + 0.6 * pictures(12)
    asked = task(defense, None, images, epsilon=0.05, starts=1)
    outcome = find("linf").run(Victim(defense), asked)
    assert (outcome.attacked - images).abs().max() <= 0.05 + 1e-6
    slope = (defense.model.weight[1] - defense.model.weight[0]).abs().sum()
    gap = (defense.model(images)[:, 0] - defense.model(images)[:, 1]).abs()
    assert torch.equal(outcome.broken, 0.05 * slope > gap)
    with pytest.raises(InputError, match="--epsilon"):
        find("linf").check(PatchThreat(2))


@pytest.mark.parametrize("name", ["patch-pgd", "lavan", "universal", "square"])
@pytest.mark.parametrize("threat", [PatchThreat(2), PatchThreat(4, shape="diamond"), PatchThreat(2, count=2)], ids=str)
def test_every_patch_attack_stays_within_the_threat(name, threat):
    defense = linear()
    asked = task(defense, threat)
    before = asked.images.clone()
    outcome = find(name).run(Victim(defense), asked)
    places = Places(threat, SIZE)
    assert torch.equal(asked.images, before)
    changed = (outcome.attacked != before).any(1, keepdim=True)
    assert not (changed & ~places.masks(outcome.choice)).any()
    assert outcome.attacked.min() >= 0
    assert outcome.attacked.max() <= 1
    assert torch.equal(outcome.label, defense.predict(outcome.attacked))
    assert torch.equal(outcome.broken, outcome.label != asked.label)
    assert outcome.broken.any()


def test_a_batch_finds_what_single_pictures_find_and_seeds_repeat():
    defense = linear(scale=0.4)
    asked = task(defense, PatchThreat(2), starts=2, steps=5)
    attack, victim = find("patch-pgd"), Victim(defense)
    together, again = attack.run(victim, asked), attack.run(victim, replace(asked, batch=4))
    assert torch.equal(together.broken, again.broken)
    assert torch.equal(together.choice, again.choice)
    assert torch.allclose(together.attacked, again.attacked, atol=1e-6)
    for b in range(len(asked.images)):
        one = replace(asked, images=asked.images[[b]], label=asked.label[[b]], numbers=[b])
        alone = attack.run(victim, one)
        assert bool(alone.broken[0]) == bool(together.broken[b])
        assert torch.equal(alone.choice[0], together.choice[b])
    other = attack.run(victim, replace(asked, seed=5))
    assert not torch.equal(other.attacked, together.attacked)


@pytest.mark.parametrize("name", ["patch-pgd", "lavan", "square"])
def test_what_a_start_draws_does_not_hang_on_the_part_it_comes_in(name):
    defense, images, threat = linear(scale=0.4), pictures(7), PatchThreat(2)
    asked = task(defense, threat, images, starts=1, steps=40)
    whole = find(name).run(Victim(defense), asked)
    assert 0 < whole.broken.sum() < len(images)
    for first, last in ((0, 2), (2, 7)):
        part = replace(asked, images=images[first:last], label=asked.label[first:last], numbers=[*range(first, last)])
        found = find(name).run(Victim(defense), part)
        assert torch.equal(found.broken, whole.broken[first:last])
        assert torch.equal(found.choice, whole.choice[first:last])
        assert torch.allclose(found.attacked, whole.attacked[first:last], atol=1e-5)


@pytest.mark.parametrize("name", ["patch-pgd", "lavan", "universal", "square"])
def test_bf16_is_for_gradients_and_never_for_answers(name):
    defense, passes = linear(seed=3), []
    defense.model.register_forward_hook(lambda *_: passes.append(torch.is_autocast_enabled("cpu")))
    victim, asked = Victim(defense, bf16=True), task(defense, PatchThreat(2))
    assert not any(passes)
    outcome = find(name).run(victim, asked)
    assert any(passes)
    passes.clear()
    answer = victim.answer(outcome.attacked).label
    assert not any(passes)
    assert torch.equal(outcome.broken, answer != asked.label)
    images = pictures()
    near, exact = (Victim(defense, bf16=bf16).leads(images, torch.Generator()) for bf16 in (True, False))
    assert near.dtype == exact.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.1


def test_broken_pictures_take_no_further_starts():
    defense = linear(scale=5.0)
    easy = task(defense, PatchThreat((6, 7)), starts=50, steps=30)
    done = []
    outcome = find("patch-pgd").run(Victim(defense), replace(easy, batch=6), done.append)
    assert outcome.broken.all()
    assert outcome.queries < 6 * 31  # not 50 starts of 30 steps
    assert done[-1] == 6
    assert done == sorted(done)


def test_a_target_is_the_only_success():
    defense = linear(scale=2.0)
    asked = task(defense, PatchThreat(4), pictures(8), target=2, starts=4, steps=20)
    outcome = find("patch-pgd").run(Victim(defense), asked)
    others = asked.label != 2
    assert torch.equal(outcome.broken[others], outcome.label[others] == 2)
    assert outcome.broken[others].any()
    assert not outcome.broken[~others].any()  # nothing to change: the answer is the target


class Liar(Undefended.__bases__[0]):
    """Certifies everything; the network under it falls."""

    name = "liar"

    def __init__(self):
        self.inner = linear(scale=3.0)
        self.model, self.theorem = self.inner.model, "trust me"

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def evidence(self, images):
        return self.inner.evidence(images)

    def label(self, evidence):
        return self.inner.label(evidence)

    def certificate(self, evidence, threat):
        relation = sees(torch.ones(1, *SIZE, dtype=torch.bool), threat, SIZE)
        label = self.label(evidence)
        margin = torch.ones((len(label), len(relation.row_of)), dtype=torch.float64)
        return Certificate(label, margin, threat, self.theorem, relation)

    def check(self, images):
        pass

    def settings(self):
        return {}

    def forward_passes(self, image_size):
        return 1


def test_a_false_certificate_is_found_by_every_patch_attack_and_a_true_one_by_none():
    defense, threat = Liar(), PatchThreat(3)
    margins = defense.certify(pictures(), threat).margin
    for name in ("patch-pgd", "lavan", "square"):
        outcome = find(name).run(Victim(defense), task(defense, threat, margins=margins, search="certified", steps=20))
        assert any(outcome.violated), name
    one_place = torch.where(torch.arange(20) == 7, 1.0, -1.0).double().expand(6, -1)
    asked = task(defense, threat, margins=one_place, search="exhaustive", steps=20)
    outcome = find("patch-pgd").run(Victim(defense), asked)
    assert all(found <= {7} for found in outcome.violated)  # only the place that was claimed


def test_certificates_of_the_shipped_model_stand():
    images = cp.data.load("fashion-sample", limit=1).images(range(1))
    defense, threat = cp.load("fashion-columns"), PatchThreat(5)
    found = defense.certify(images, threat)
    asked = Task(images, found.label, threat, [0], 6, 4, 0.3, "certified", found.margin)
    outcome = find("patch-pgd").run(Victim(defense), asked)
    assert not any(outcome.violated)
    assert sum(map(len, outcome.tried)) == 6


def confident(views: int, classes: int, seed: int) -> torch.Tensor:
    """Logits whose softmax is clear everywhere."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.randint(classes, (5, views), generator=generator)
    favourite = torch.randint(classes, (5, 1), generator=generator)
    top = torch.where(torch.rand((5, views), generator=generator) < 0.85, favourite, top)
    return 12 * nn.functional.one_hot(top, classes).float() + torch.rand((5, views, classes), generator=generator)


RULES = [
    Vote(),
    ClippedSum(0.0, 1.0),
    RobustMask(Windows.runs(6, 2), 0.0, 1.0),
    RobustMask(Windows.runs(6, 2), 0.5, 1.0),
    RobustMask(Windows.runs(6, 2), 1.0, 1.0),
    TrimmedMean(1, 0.0, 1.0),
    Median(0.0, 1.0),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}")
def test_soft_rules_answer_as_the_rule_where_evidence_is_clear(rule):
    agree = 0
    for seed in range(8):
        values = soft_votes(confident(6, 3, seed), 0.3).requires_grad_()
        found = rule.leads(values)
        hard = rule.predict((values.detach() > 0.5).float())
        tallies = (values.detach() > 0.5).float().sum(1).topk(2, 1).values
        clear = tallies[:, 0] - tallies[:, 1] >= 2
        if isinstance(rule, RobustMask | TrimmedMean | Median):
            clear &= tallies[:, 0] >= 5
        assert torch.equal(found.argmax(1)[clear], hard[clear])
        agree += int(clear.sum())
        (gradient,) = torch.autograd.grad(found.gather(1, found.argmin(1)[:, None]).sum(), values)
        assert torch.isfinite(gradient).all()
        assert (gradient != 0).any((1, 2)).all()
    assert agree > 3


def test_detectors_lead_only_without_an_alarm():
    windowed, masked = MaskedDetection(Windows.runs(4, 1), 0.5), MinorityReports(0.5)
    quiet, loud = 0, 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn((5, 4, 3), generator=generator) * 6 + torch.tensor([4.0, 0, 0])
        for rule, evidence in ((windowed, logits), (masked, logits.softmax(2))):
            found = rule.leads(evidence)
            answer, alarm = rule.predict(evidence), rule.alarm(evidence)
            says = found.max(1)
            assert torch.equal(says.indices[says.values > 0.02], answer[says.values > 0.02])
            certain = says.values > 0.3
            assert not (alarm & certain & (found.sort(1).values[:, -2] < -0.3) & (says.values > 0.9)).any()
            quiet, loud = quiet + int((certain & ~alarm).sum()), loud + int((~certain & alarm).sum())
    assert quiet > 20
    assert loud > 20


def test_double_masking_leads_where_all_masks_agree():
    evidence = torch.zeros((2, 6, 3))
    evidence[0, :, 1] = 1.0  # three masks, six views: all say 1
    evidence[1, :, 2] = 1.0
    found = DoubleMask().leads(evidence)
    assert torch.equal(found.argmax(1), DoubleMask().predict(evidence))
    assert (found.amax(1) > 0).all()


def test_a_plain_attack_on_masks_looks_at_the_bare_picture():
    seen = []

    class Watched(Linear):
        def forward(self, pictures):
            seen.append(pictures)
            return super().forward(pictures)

    images = pictures(2)
    for method in (cp.PatchCleanser, cp.MinorityReports):
        defense = method(Watched().eval(), PatchThreat(2), masks=3)
        seen.clear()
        found = Victim(defense, adaptive=False).leads(images, torch.Generator())
        assert len(seen) == 1
        assert torch.equal(seen[0], images)
        assert torch.equal(found, Victim(linear()).leads(images, torch.Generator()))


@pytest.mark.parametrize("name", ["patch-pgd", "lavan", "universal", "square"])
def test_a_plain_attack_asks_the_defense_once_for_each_picture(name):
    defense, images = cp.PatchCleanser(Linear().eval(), PatchThreat(3), masks=2), pictures(4)
    asked = task(defense, PatchThreat(3), images, starts=4)
    victim, answered = Victim(defense, adaptive=False), []
    answer = victim.answer
    victim.answer = lambda x: (answered.append(x), answer(x))[1]  # type: ignore[method-assign]
    outcome = find(name).run(victim, asked)
    assert sum(map(len, answered)) == 4
    assert torch.equal(torch.cat(answered), outcome.attacked)
    assert torch.equal(outcome.label, defense.predict(outcome.attacked))
    assert torch.equal(outcome.broken, outcome.label != asked.label)
    assert all(len(tried) >= 1 for tried in outcome.tried)
    if name == "patch-pgd":
        network = linear()
        fell = network.predict(outcome.attacked) != asked.label
        assert fell.any()
        assert torch.equal(outcome.loss > 0, fell)


class Blind(nn.Module):
    """A network through NumPy, as an ONNX session: no gradients."""

    encoding = "picture"

    def forward(self, pictures):
        values = torch.from_numpy(pictures.detach().cpu().numpy().copy())
        return torch.stack([values.mean((1, 2, 3)), torch.full((len(values),), 0.5)], 1)


def test_without_gradients_the_attacks_that_fit_are_named():
    defense = Undefended(Blind().eval())
    images = 0.3 + 0.05 * pictures()
    asked = task(defense, PatchThreat((5, 6)), images, starts=2, steps=30)
    for name in ("patch-pgd", "lavan", "universal"):
        with pytest.raises(InputError, match="attacks that need none: square"):
            find(name).run(Victim(defense), asked)
    outcome = find("square").run(Victim(defense), asked)
    assert outcome.broken.all()


@pytest.mark.parametrize("build", ["smoothing", "randomized"])
def test_sampled_and_rendered_views_give_gradients(build):
    class Net(nn.Module):
        encoding = "null"

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIZE[0] * SIZE[1], 3))

        def forward(self, views):
            return 5 * self.body(views)

    model = Net().eval().requires_grad_(False)
    if build == "smoothing":
        defense = cp.DerandomizedSmoothing(model, Columns(2), threshold=None)
    else:
        defense = cp.RandomizedAblation(model, cp.views.RandomPixels(20), samples=50, samples_to_pick=20)
    asked = task(defense, PatchThreat(4), starts=2, steps=10)
    Victim(defense).check_gradients(asked.images)
    outcome = find("patch-pgd").run(Victim(defense), asked)
    assert torch.equal(outcome.label, defense.predict(outcome.attacked))


VIEWS = {
    "columns": (Columns(2), "crop", 3),
    "rows": (Rows(3, stride=2), "crop", 3),
    "blocks": (Blocks(3), "crop", 3),
    "cross": (Cross(2), "crop", 3),
    "null": (Columns(2), "null", 1),
}


class OfViews(nn.Module):
    """Different for every pixel of a view: its logits are sums of squares with fixed weights."""

    def __init__(self, encoding: str):
        super().__init__()
        self.encoding = encoding

    def forward(self, views):
        flat = views.flatten(1)
        weight = torch.randn(flat.shape[1], 4, generator=torch.Generator().manual_seed(4)).to(flat)
        return (flat + flat * flat) @ weight


@pytest.mark.parametrize("name", VIEWS)
def test_views_that_no_patch_touches_are_not_computed_again(name):
    views, encoding, batch = VIEWS[name]
    images = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    defense = cp.DerandomizedSmoothing(OfViews(encoding).eval(), views, threshold=0.3)
    victim = Victim(defense)
    attack = task(defense, PatchThreat(2), images, batch=batch)
    clean = CleanViews.of(victim, attack)
    assert clean is not None
    places, picture = attack.places(), torch.tensor([2, 0, 0, 1])
    mask = places.masks(torch.tensor([[0], [5], [48], [30]]))
    attacked = torch.where(mask, 0.7, images[picture])
    found = []
    for leads in (lambda x: victim.leads(x, torch.Generator()), lambda x: clean.leads(x, picture, mask)):
        x = attacked.clone().requires_grad_()
        of_each = leads(x)
        (gradient,) = torch.autograd.grad((of_each * torch.arange(4)).sum(), x)
        found.append((of_each, gradient * mask))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    seen, model_forward = [], defense.model.forward
    defense.model.forward = lambda x: (seen.append(len(x)), model_forward(x))[1]  # type: ignore[method-assign]
    clean.leads(attacked, picture, mask)
    assert sum(seen) < 0.8 * len(picture) * views.number((8, 8))


@pytest.mark.parametrize("name", VIEWS)
def test_touched_views_are_passed_in_bf16_as_all_are(name):
    views, encoding, batch = VIEWS[name]
    images = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    defense = cp.DerandomizedSmoothing(OfViews(encoding).eval(), views, threshold=0.3)
    attack = task(defense, PatchThreat(2), images, batch=batch)
    mask = attack.places().masks(torch.tensor([[0], [48], [30]]))
    attacked, found = torch.where(mask, 0.7, images), []
    for bf16 in (False, True):
        victim = Victim(defense, bf16=bf16)
        clean = CleanViews.of(victim, attack)
        assert clean is not None
        found += [victim.leads(attacked, torch.Generator()), clean.leads(attacked, torch.arange(3), mask)]
    torch.testing.assert_close(found[2], found[3], rtol=1e-3, atol=1e-3)
    assert not torch.equal(found[0], found[2])
    assert {leads.dtype for leads in found} == {torch.float32}


def test_views_that_show_most_of_a_picture_are_all_computed():
    defense = cp.DerandomizedSmoothing(OfViews("null").eval(), Columns(5), threshold=0.3)
    images = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    assert CleanViews.of(Victim(defense), task(defense, PatchThreat(2), images)) is None
    assert CleanViews.of(Victim(linear()), task(linear(), PatchThreat(2))) is None


def test_the_universal_patch_is_one_for_all_and_never_leaves_a_place():
    places = Places(PatchThreat(3), SIZE)
    patch = torch.rand(1, 3, 3)
    choice = torch.tensor([[0], [len(places) - 1]])
    straight = worn(patch, torch.zeros(2, 1, *SIZE), choice, torch.tensor([[0.0, 1.0]] * 2), places)
    assert torch.allclose(straight[0, :, :3, :3], patch, atol=1e-5)
    assert torch.allclose(straight[1, :, -3:, -3:], patch, atol=1e-5)
    turned = worn(patch, torch.zeros(2, 1, *SIZE), choice, poses(2, torch.Generator().manual_seed(0)), places)
    assert not (turned[0] != 0)[:, 3:].any()
    defense = linear(scale=2.0)
    asked = task(defense, PatchThreat(3), steps=20)
    learned = find("universal").prepare(Victim(defense), asked)
    first = find("universal").run(Victim(defense), replace(asked, prepared=learned))
    assert torch.equal(first.attacked, find("universal").run(Victim(defense), asked).attacked)


@pytest.mark.parametrize(
    ("name", "threat", "words"),
    [
        ("patch-pgd", SparseThreat(2), "--attack sparse"),
        ("square", None, "--attack linf"),
        ("sparse", PatchThreat(2), "--attack patch-pgd"),
    ],
)
def test_a_threat_that_does_not_fit_is_told(name, threat, words):
    with pytest.raises(InputError, match=words):
        find(name).check(threat)


def test_names_and_searches_are_checked():
    assert list(ATTACKS) == ["patch-pgd", "lavan", "universal", "square", "sparse", "linf"]
    with pytest.raises(InputError, match="did you mean 'patch-pgd'"):
        find("patch-pdg")
    defense = linear()
    for search, words in (("nowhere", "use one of"), ("margin", "needs a certificate")):
        with pytest.raises(InputError, match=words):
            find("patch-pgd").run(Victim(defense), task(defense, PatchThreat(2), search=search))
