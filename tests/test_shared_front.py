"""PatchCURE: a front computed once, masks over its features; equal to looking at every masked picture."""

import pytest
import torch
from support import write_parquet, write_recipe

import certipatch as cp
from certipatch import evidence, models
from certipatch.defenses import PatchCleanser, PatchCURE
from certipatch.defenses.patchcure import cell_masks
from certipatch.errors import InputError
from certipatch.models import ConvSettings, SharedBagNetSettings, SharedViTSettings
from certipatch.rules import DoubleMask
from certipatch.training.recipe import Recipe
from certipatch.views import MaskPairs
from certipatch.views.incidence import sees
from certipatch.views.render import render

SIZE = (16, 24)
NETWORKS = {
    "bagnet 6": SharedBagNetSettings(receptive_field=6, widths=(4, 6, 4, 6, 8)),
    "bagnet 10": SharedBagNetSettings(receptive_field=10, widths=(4, 6, 4, 6, 8)),
    "vit": SharedViTSettings(patch_size=2, window_size=2, embed_dim=8, front_depth=1, depth=1, num_heads=2),
}
THREATS = [cp.PatchThreat(3), cp.PatchThreat((2, 5)), cp.PatchThreat(4, shape="line"), cp.PatchThreat(2, count=2)]


def network(name: str) -> models.SharedFront:
    """In eval mode, float64, random in every parameter and statistic; classes are balanced over random pictures."""
    torch.manual_seed(0)
    found = NETWORKS[name].build(None, 2, 3, SIZE).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for key, tensor in [*found.named_parameters(), *found.named_buffers()]:
        if tensor.is_floating_point() and not key.startswith("_"):
            tensor += (0.2 if tensor.ndim > 1 else 0.1) * torch.rand(
                tensor.shape, generator=generator, dtype=torch.float64
            )
    logits = found(pictures(30, 9))
    found.head.weight /= logits.std(0)[:, None]
    found.head.bias /= logits.std(0)
    found.head.bias -= found(pictures(30, 9)).mean(0)
    return found


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Squares of some brightness each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 2, 2, 3, generator=generator, dtype=torch.float64).kron(torch.ones(1, 1, 8, 8))
    return (0.8 * coarse + 0.2 * torch.rand(count, 2, *SIZE, generator=generator, dtype=torch.float64)).clamp(0, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cell_depends_on_its_receptive_field_alone(name):
    model, images = network(name), pictures(1).requires_grad_()
    fields = model.fields
    seen = fields.visible(SIZE)
    features = model.features(images)[0, :-1].flatten(1)
    assert features.shape[1] == len(seen)
    for cell in range(0, len(seen), 5):
        (gradient,) = torch.autograd.grad(features[:, cell].square().sum(), images, retain_graph=True)
        assert (gradient[0][:, ~seen[cell]] == 0).all()
        assert (gradient[0][:, seen[cell]] != 0).double().mean() > 0.3


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_cells_are_those_that_see_a_hidden_pixel(name):
    model = network(name)
    visible = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(2)) < 0.97
    seen = model.fields.visible(SIZE)
    expected = ~(seen[None] & ~visible[:, None]).flatten(2).any(2)
    assert torch.equal(model.shown_cells(visible).flatten(1), expected)
    cells = torch.rand(3, *model.fields.grid, generator=torch.Generator().manual_seed(3)) < 0.1
    assert torch.equal(model.seen_pixels(cells), (seen[None] & cells.flatten(1)[:, :, None, None]).any(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_equals_brute_force_over_masked_pictures(name, threat, gap):
    """A front and a back end for every pair of masks, cut out of the picture, without any of PatchCURE's own parts."""
    model, images = network(name), pictures(6, 3)
    defense = PatchCURE(model, threat, masks=2, min_mean_gap=gap)
    pairs = defense.views_of(SIZE)
    index = torch.arange(pairs.number(SIZE))
    rendered = render("null", images, pairs, index)
    logits = model(rendered.flatten(0, 1)).unflatten(0, (6, -1))
    torch.testing.assert_close(defense.exported_network(SIZE)(images), logits, rtol=1e-9, atol=1e-9)
    relation, scores = sees(pairs, threat, SIZE), evidence.scores(logits)
    expected = DoubleMask(gap).certify(scores, relation.rows)
    found = defense.certify(images, threat)
    assert torch.equal(found.label, expected.label)
    assert torch.equal(defense.predict(images), expected.label)
    margin = expected.margin[:, relation.row_of]
    proven = margin > 1e-9  # elsewhere it stops at the first pair that fails
    torch.testing.assert_close(found.margin[proven], margin[proven], rtol=0, atol=1e-6)
    assert (found.margin[~proven] <= margin[~proven] + 1e-6).all()
    assert torch.equal(found.certified, proven.all(1))
    quick = PatchCURE(model, threat, masks=2, all_margins=False, min_mean_gap=gap)
    assert torch.equal(quick.certify(images, threat).certified, found.certified)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_no_pasted_patch_changes_a_certified_answer(name):
    defense, images = PatchCURE(network(name), THREATS[0], masks=3), pictures(5, 4)
    found = defense.certify(images, THREATS[0])
    generator, attacked, expected, changed = torch.Generator().manual_seed(5), [], [], 0
    for i, places in enumerate(found.margin > 0):
        for place in places.nonzero()[:, 0][:: max(1, int(places.sum()) // 12)].tolist():
            top, left, height, width = found.box(place)
            for paint in (0.0, 1.0, torch.rand(2, height, width, generator=generator, dtype=torch.float64)):
                picture = images[i].clone()
                picture[:, top : top + height, left : left + width] = paint
                attacked.append(picture)
                expected.append(found.label[i])
                changed += not torch.equal(picture, images[i])
    assert changed >= 12
    assert torch.equal(defense.predict(torch.stack(attacked)), torch.stack(expected))


@pytest.mark.slow
def test_pasted_patches_of_the_soundness_kit():
    defense = PatchCURE(network("bagnet 6"), THREATS[0], masks=3)
    report = cp.testing.check_defense(defense, pictures(4, 4), THREATS[0], trials=3, slack=1e-6)
    assert report.attacks > 0
    assert report.certified > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_patchcleanser_says_with_the_same_masks(name):
    model, images = network(name), pictures(4, 5)
    defense = PatchCURE(model, THREATS[0], masks=2)
    pairs = defense.views_of(SIZE)
    assert isinstance(pairs, MaskPairs)
    slow = PatchCleanser(model, THREATS[0], masks=pairs.masks)
    one, other = defense.certify(images, THREATS[0]), slow.certify(images, THREATS[0])
    assert torch.equal(one.label, other.label)
    proven = one.margin > 0
    assert torch.equal(proven, other.margin > 0)
    torch.testing.assert_close(one.margin[proven], other.margin[proven], rtol=0, atol=1e-6)


def test_every_touched_cell_lies_in_one_mask():
    model = network("bagnet 6")
    masks = cell_masks(model, (cp.PatchThreat(3),), SIZE, (3, 2), None)
    touched = sees(model.fields, cp.PatchThreat(3), SIZE).rows
    assert (touched[:, None] <= masks.flatten(1)).all(2).any(1).all()
    assert len(masks) == 6
    assert masks.double().mean() < 0.6


def test_the_front_runs_once_and_passes_are_counted_by_multiply_adds():
    model, images = network("bagnet 6"), pictures(3, 6)
    defense = PatchCURE(model, THREATS[0], masks=3)
    defense.check(images)
    defense.evidence(images)  # once, to find how many rows a pass has
    seen = []
    model.local.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    found = defense.evidence(images)
    assert len(set(seen)) == 1  # passes of one shape, as few as hold three pictures
    assert 3 <= sum(seen) < 3 + seen[0]
    front, back = next(iter(defense._costs.values()))
    assert front > back > 0
    looked = 45 if found.unsure is None else 45 - found.unsure.sum(1)
    assert (
        found.passes.tolist()
        == torch.as_tensor((front + looked * back) / (front + back)).ceil().long().expand(3).tolist()
    )
    assert defense.forward_passes(SIZE) < 45


def test_a_front_that_sees_further_than_it_says_is_refused():
    model = network("bagnet 6")
    model.local.append(torch.nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False))
    with pytest.raises(InputError, match="leaks"):
        PatchCURE(model, THREATS[0], masks=3).check(pictures(1))


@pytest.mark.slow
def test_recipes_train_both_kinds(tmp_path):
    from certipatch.training.recipe import read
    from certipatch.training.train import train

    data = write_parquet(tmp_path / "data")
    for settings in (
        {"name": "shared-bagnet", "widths": [8, 8, 8, 16, 16]},
        {"name": "shared-vit", "embed_dim": 8, "num_heads": 2},
    ):
        changes = {"views": None, "model": settings, "defense": "patchcure", "settings": {"patch": 2, "masks": 2},
                   "objective": {}, "epochs": 1, "learning_rate": 0.01}  # fmt: skip
        recipe = read(write_recipe(tmp_path / "recipe.yaml", **changes), [f"data={data}"])
        train(recipe, tmp_path / settings["name"])
        defense = cp.load(str(tmp_path / settings["name"]))
        assert isinstance(defense, PatchCURE)
        images = cp.data.load(str(data), "test").images(range(4))
        found = defense.certify(images, cp.PatchThreat(2))
        assert torch.equal(found.label, defense.predict(images))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="shared-bagnet or shared-vit"):
        PatchCURE(models.ConvNet(None, 1, 2, SIZE, (4,)).eval(), THREATS[0])
    with pytest.raises(InputError, match="6, 10, 9, 17 or 33 pixels, not 7"):
        models.SharedBagNet(1, 2, SIZE, receptive_field=7)
    with pytest.raises(InputError, match="do not fill"):
        models.SharedViT(1, 2, (16, 22))
    with pytest.raises(InputError, match="5 widths, not 2"):
        models.SharedBagNet(1, 2, SIZE, widths=(4, 4))
    with pytest.raises(ValueError, match="needs a network with a shared front"):
        Recipe(name="n", data="d", epochs=1, defense="patchcure", model=ConvSettings())
    with pytest.raises(InputError, match="cannot share"):
        models.SharedViT(1, 2, SIZE, embed_dim=10)


@pytest.mark.parametrize("name", NETWORKS)
def test_attacks_go_through_double_masking_on_features(name):
    """The same leads and gradients as of masked pictures, one front per picture instead of one per mask."""
    from certipatch.defenses.soft_double_masking import sampled_pair_leads

    defense = PatchCURE(network(name), THREATS[0], masks=2)
    images = pictures(3, 7).requires_grad_()
    draw = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    fronts = []
    hook = defense.front.register_forward_hook(lambda *_: fronts.append(1))
    found = defense.leads(images, draw())
    hook.remove()
    assert not fronts  # the front by itself, never the whole network
    expected = sampled_pair_leads(defense.front, defense.views_of(SIZE), images, draw())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.square().sum(), images)
    (brute,) = torch.autograd.grad(expected.square().sum(), images)
    torch.testing.assert_close(gradient, brute, rtol=1e-3, atol=1e-6)
    assert gradient.abs().amax() > 0


class Brighter(models.SharedFront):
    """Says which channel is the brighter one in what is shown: random networks are certain under every mask."""

    def __init__(self):
        local = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, bias=False)).requires_grad_(False)
        local[0].weight[:] = torch.eye(2, 4)[:, :, None, None]
        super().__init__(2, SIZE, models.receptive_fields(local.eval(), SIZE))
        self.local = local

    def front(self, views):
        return self.local(views)

    def back(self, features):
        return 30 * features[:, :2].mean((2, 3))


@pytest.mark.slow
def test_an_attack_changes_answers_but_no_certified_one():
    from certipatch.attacks import Task, Victim, find

    defense, images = PatchCURE(Brighter().double().eval(), THREATS[0], masks=2), pictures(20, 4)
    proof = defense.certify(images, THREATS[0])
    how = {"starts": 4, "steps": 6, "step": 0.3, "search": "random", "margins": proof.margin}
    outcome = find("patch-pgd").run(Victim(defense), Task(images, proof.label, THREATS[0], list(range(20)), **how))
    assert outcome.broken.any()
    assert proof.certified.any()
    assert not any(outcome.violated)
    assert not (outcome.broken & proof.certified).any()
    assert torch.equal(defense.predict(outcome.attacked), outcome.label)
    assert (outcome.label != proof.label)[outcome.broken].all()
