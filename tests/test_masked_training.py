"""Training under two masks: which masks, how they are laid, and that recipes of it are trained and resumed exactly."""

import math

import pytest
import torch
from safetensors.torch import load_file
from support import write_parquet, write_recipe
from torch import nn
from torch.nn import functional as F

import certipatch as cp
from certipatch import defenses, models
from certipatch.errors import InputError
from certipatch.saved import open_defense
from certipatch.training.augment import draw_changes, mixed, recoloured
from certipatch.training.mask_search import MaskHierarchy, MaskMemory, apply_masks, assign_fine_masks, masks_of
from certipatch.training.masking import MaskLoss
from certipatch.training.muon import Muon, orthogonal
from certipatch.training.recipe import Augment, MaskTraining, Recipe, read
from certipatch.training.train import train
from certipatch.views import mask_set
from certipatch.views.render import fill, null

SIZE, THREAT = (12, 14), cp.PatchThreat(3)


def levels(*per_axis: int) -> list[torch.Tensor]:
    return [mask_set([THREAT], SIZE, (k, k)) for k in per_axis]


def images(count: int = 5, channels: int = 2) -> torch.Tensor:
    return torch.rand(count, channels, *SIZE, generator=torch.Generator().manual_seed(0))


def test_masks_are_laid_as_the_defense_lays_them():
    hidden, pictures = levels(3)[0][:5], images()
    kept = pictures.clone()
    filled = torch.stack([fill(pictures[[i]], ~hidden[[i]], 0.3)[0, 0] for i in range(5)])
    assert torch.equal(apply_masks("picture", pictures, hidden, 0.3), filled)
    coded = torch.stack([null(pictures[[i]], ~hidden[[i]])[0, 0] for i in range(5)])
    assert torch.equal(apply_masks("null", pictures, hidden), coded)
    assert torch.equal(pictures, kept)
    with pytest.raises(InputError, match="this network reads crop"):
        apply_masks("crop", pictures, hidden)


def test_random_masks_are_two_of_the_set_drawn_anew_for_each_picture():
    (fine,) = levels(3)
    masks = MaskHierarchy([fine])
    pairs = (fine[:, None] | fine[None]).flatten(0, 1)
    drawn = masks.hidden(masks.random(400, torch.Generator().manual_seed(1)))
    which = (drawn.flatten(1)[:, None] == pairs.flatten(1)).all(2)
    assert which.any(1).all()
    assert len(drawn.flatten(1).unique(dim=0)) == len(pairs.flatten(1).unique(dim=0))  # every pair comes up
    assert torch.equal(drawn, masks.hidden(masks.random(400, torch.Generator().manual_seed(1))))


def test_the_greedy_choice_is_the_worst_mask_and_then_the_worst_beside_it():
    """Against a literal search; losses are random but depend on the picture and on what is hidden alone."""
    (fine,) = levels(4)
    weight = torch.rand(7, SIZE[0] * SIZE[1], generator=torch.Generator().manual_seed(2)) ** 4

    def losses(picture: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return (weight[picture] * hidden.flatten(1)).sum(1)

    masks = MaskHierarchy([fine])
    found = masks.hidden(masks.worst(losses, 7, step=10))
    for i in range(7):
        hidden = torch.zeros(SIZE, dtype=torch.bool)
        for _ in range(2):
            tried = [losses(torch.tensor([i]), (mask | hidden)[None]).item() for mask in fine]
            hidden = hidden | fine[int(torch.tensor(tried).argmax())]
        assert torch.equal(found[i], hidden)


def test_from_coarse_to_fine_takes_fewer_passes_and_is_seldom_worse():
    coarse, fine = levels(2, 4)
    table = assign_fine_masks(coarse, fine)
    assert sorted(table.flatten().unique().tolist()) == list(range(len(fine)))  # every fine mask can be found
    for mask, children in zip(coarse, table, strict=True):
        assert (fine[children] & mask).flatten(1).sum(1).min() > 0.5 * fine[0].sum()
    masks, seen = MaskHierarchy([coarse, fine]), []
    weight = torch.rand(40, SIZE[0] * SIZE[1], generator=torch.Generator().manual_seed(3)) ** 8

    def losses(picture: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(picture))
        return (weight[picture] * hidden.flatten(1)).sum(1)

    found = masks.hidden(masks.worst(losses, 40, step=1000))
    assert sum(seen) == 40 * masks.evaluations == 40 * 2 * (4 + 4)
    every = torch.arange(40)
    plain = MaskHierarchy([fine])
    reached = losses(every, found) / losses(every, plain.hidden(plain.worst(losses, 40, step=1000)))
    assert reached.mean() > 0.9
    assert reached.max() <= 1.3


def test_uneven_levels_lose_no_mask():
    coarse, fine = levels(2, 3)
    assert set(assign_fine_masks(coarse, fine).flatten().tolist()) == set(range(len(fine)))
    assert set(assign_fine_masks(coarse, coarse).flatten().tolist()) == set(range(len(coarse)))


def test_the_loss_under_the_worst_masks_is_larger_and_statistics_stay():
    torch.manual_seed(0)
    network = models.ConvNet(None, 2, 3, SIZE, (8, 8))
    masks, pictures, targets = MaskHierarchy(levels(3)), images(16), torch.arange(16) % 3
    loss = MaskLoss(network, network, masks, MaskTraining(strategy="greedy", greedy_start=0.5), 0.5)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    hidden = masks.hidden(loss.worst(pictures, targets))
    assert network.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    network.eval()

    def of(shown: torch.Tensor) -> float:
        return F.cross_entropy(network(apply_masks("picture", pictures, shown)), targets).item()

    drawn = [of(masks.hidden(masks.random(16, torch.Generator().manual_seed(seed)))) for seed in range(5)]
    assert of(hidden) > max(drawn)
    draw = torch.Generator().manual_seed(0)
    assert loss(pictures, targets, 0.7, draw).item() == pytest.approx(of(hidden), rel=1e-5)
    expected = of(masks.hidden(masks.random(16, torch.Generator().manual_seed(0))))
    assert loss(pictures, targets, 0.2, draw).item() == pytest.approx(expected, rel=1e-5)


def test_one_of_two_masks_moves_to_where_the_gradient_promises_the_largest_loss():
    """Against a literal search over all pairs that keep one of the masks, of loss as the gradient continues it."""
    torch.manual_seed(0)
    network = models.ConvNet(None, 2, 3, SIZE, (8, 8))
    masks, pictures, targets = MaskHierarchy(levels(3)), images(16), torch.arange(16) % 3
    memory, fine = MaskMemory(20, masks.levels[-1]), masks.levels[-1]
    loss = MaskLoss(network, network, masks, MaskTraining(strategy="hill-climbing"), 0.5, memory=memory)
    chosen = torch.arange(19, 3, -1)
    memory.set_batch(chosen, draw_changes(16, SIZE, Augment(), torch.Generator()))
    pair = memory.pairs(torch.Generator().manual_seed(3))
    assert len(pair.unique(dim=0)) > 8  # nothing is known yet: random ones
    loss(pictures, targets, 0.5, torch.Generator().manual_seed(3)).backward()
    moved = memory.pairs(torch.Generator())
    assert memory.centres[:4].isnan().all()  # of other pictures nothing has been written
    shown = apply_masks("picture", pictures, fine[pair].any(1), 0.5).requires_grad_()
    F.cross_entropy(network(shown), targets).backward()
    for i in range(16):
        candidates = [(a, b) for a in range(len(fine)) for b in range(len(fine)) if len({a, b} & set(pair[i].tolist()))]
        candidates = [(a, b) for a, b in candidates if not {a, b} <= set(pair[i].tolist())]

        def promised(a: int, b: int, i: int = i) -> float:
            other = apply_masks("picture", pictures[[i]], fine[[a]] | fine[[b]], 0.5)[0]
            return (shown.grad[i] * (other - shown[i].detach())).sum().item()

        best = max(promised(a, b) for a, b in candidates)
        assert tuple(moved[i].tolist()) in candidates
        assert promised(*moved[i].tolist()) == pytest.approx(best, abs=1e-7)


def test_remembered_masks_hide_the_same_part_of_a_picture_however_it_is_changed():
    (fine,) = levels(6)
    memory, numbers = MaskMemory(30, fine), torch.arange(1, 1 + SIZE[0] * SIZE[1]).view(1, 1, *SIZE).repeat(30, 1, 1, 1)
    every, inner = torch.arange(30), fine.flatten(1).sum(1).max()
    known = torch.randint(len(fine), (30, 2), generator=torch.Generator().manual_seed(0))
    memory.set_batch(every, draw_changes(30, SIZE, Augment(), torch.Generator()))
    memory.update(known)
    assert torch.equal(memory.pairs(torch.Generator()), known)
    shared = []
    for seed in range(5):
        changes = draw_changes(30, SIZE, Augment(max_shift=1, flip=True), torch.Generator().manual_seed(seed))
        memory.set_batch(every, changes)
        shown, pairs = changes.of(numbers)[:, 0], memory.pairs(torch.Generator())
        for i, mask in ((i, mask) for i in range(30) for mask in (0, 1)):
            before = set(numbers[i, 0][fine[known[i, mask]]].tolist())
            now = set(shown[i][fine[pairs[i, mask]]].tolist())
            shared.append(len(before & now) / inner)
        memory.update(pairs)
        memory.set_batch(every, changes)
        assert torch.equal(memory.pairs(torch.Generator()), pairs)
        memory.set_batch(every, draw_changes(30, SIZE, Augment(), torch.Generator()))
        memory.update(known)
    assert sum(shared) / len(shared) > 0.6  # of two random masks, a tenth
    flips = draw_changes(30, SIZE, Augment(flip=True), torch.Generator().manual_seed(1))
    memory.set_batch(every, flips)
    pairs, shown = memory.pairs(torch.Generator()), flips.of(numbers)[:, 0]
    assert flips.mirrored.any()
    symmetric = {mask for mask in range(len(fine)) if any(torch.equal(fine[mask].flip(1), other) for other in fine)}
    for i in range(30):
        if symmetric >= set(known[i].tolist()):
            assert set(numbers[i, 0][fine[known[i]].any(0)].tolist()) == set(shown[i][fine[pairs[i]].any(0)].tolist())


@pytest.mark.parametrize("asked", [{"max_shift": 3, "flip": True}, {"flip": True}, {"max_shift": 2}, {}])
def test_changed_points_are_those_of_the_changed_pixels(asked):
    """Every pixel has a number of its own; black comes in from beyond the borders."""
    numbers = torch.arange(1, 1 + SIZE[0] * SIZE[1]).view(1, 1, *SIZE).repeat(40, 1, 1, 1)
    changes = draw_changes(40, SIZE, Augment(**asked), torch.Generator().manual_seed(0))
    shown = changes.of(numbers)[:, 0]
    assert len(changes.corners.unique(dim=0)) > (1 if "max_shift" in asked else 0)
    points = torch.cartesian_prod(*(torch.arange(float(side)) for side in SIZE)).expand(40, -1, -1)
    source = changes.source(points)
    assert torch.equal(changes.shown(source), points)
    row, column = source.long().unbind(-1)
    inside = (row >= 0) & (row < SIZE[0]) & (column >= 0) & (column < SIZE[1])
    expected = torch.where(inside, row * SIZE[1] + column + 1, 0)
    assert torch.equal(shown.flatten(1), expected)


@pytest.mark.parametrize(
    "asked",
    [{"max_rotation": 20}, {"max_scale": 0.3}, {"max_rotation": 9, "max_scale": 0.1, "max_shift": 2, "flip": True}],
)
def test_turned_points_are_those_of_the_turned_pixels(asked):
    """Of a picture whose values rise evenly along both axes, which values between pixels continue."""
    size, draw = (17, 23), torch.Generator().manual_seed(0)
    row, column = (torch.arange(float(side)) for side in size)
    ramp = (1 + 2 * row[:, None] + 3 * column).to(torch.uint8).expand(50, 1, -1, -1)
    changes = draw_changes(50, size, Augment(**asked), draw)
    points = torch.cartesian_prod(row, column).expand(50, -1, -1)
    source = changes.source(points)
    torch.testing.assert_close(changes.shown(source), points, rtol=0, atol=1e-4)
    row, column = source.unbind(-1)
    inside = (row > 0) & (row < size[0] - 1) & (column > 0) & (column < size[1] - 1)
    outside = (row < -1) | (row > size[0]) | (column < -1) | (column > size[1])
    shown = changes.of(ramp).flatten(1)
    torch.testing.assert_close(shown[inside], (1 + 2 * row + 3 * column)[inside], rtol=0, atol=1e-3)
    assert inside.float().mean() > 0.6
    assert outside.any()
    assert (shown[outside] == 0).all()
    assert changes.turned is not None
    lengths = torch.linalg.svdvals(changes.turned).log().abs()
    assert lengths.max() < math.log(1 + asked.get("max_scale", 0)) + 1e-4
    across = changes.turned[:, 1, 0] / changes.turned[:, 0, 0]
    assert across.atan().rad2deg().abs().max() < asked.get("max_rotation", 0) + 1e-3
    assert "max_rotation" not in asked or across.atan().rad2deg().abs().max() > asked["max_rotation"] * 0.8


def test_recoloured_pictures_keep_what_a_colour_change_keeps():
    """Of each the order of brightness, and greys stay grey; factors reach both ends and differ from picture to picture."""
    pictures = 0.45 + 0.1 * images(200, 3)  # far from 0 and 1, so that nothing is cut off
    pictures[:, :, 0, 0] = pictures[:, :1, 0, 0]
    found = recoloured(pictures, 0.3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[:, 1:, 0, 0], found[:, :1, 0, 0].expand(-1, 2))
    before, after = pictures.mean(1).flatten(1), found.mean(1).flatten(1)
    assert torch.equal(before.argsort(1)[:, ::40], after.argsort(1)[:, ::40])
    factors = {
        "brightness": after.mean(1) / before.mean(1),
        "contrast": after.std(1) / before.std(1) / (after.mean(1) / before.mean(1)),
        "saturation": found.std(1).mean((1, 2)) / pictures.std(1).mean((1, 2)) / (after.std(1) / before.std(1)),
    }
    for name, factor in factors.items():
        assert 1 / 1.301 < factor.min() < 0.85 < 1.15 < factor.max() < 1.301, name
    assert torch.equal(recoloured(pictures, 0.0, torch.Generator()).round(decimals=5), pictures.round(decimals=5))
    assert recoloured(images(50, 3), 0.9, torch.Generator().manual_seed(1)).aminmax() == (0, 1)


def test_a_mixed_picture_is_mostly_itself_and_its_target_says_how_much_of_the_other_is_in_it():
    pictures, targets = images(60), torch.eye(60)
    found, shares = mixed(pictures, targets, 0.4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, (shares @ pictures.flatten(1)).view_as(pictures))
    own = shares.diagonal()
    assert own.min() >= 0.6
    assert own.sort().values[3] < 0.65
    assert torch.allclose(shares.sum(1), torch.ones(60))
    assert ((shares > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("asked", [{}, {"strategy": "greedy"}, {"random_candidates": 2}, {"strategy": "hill-climbing"}])
def test_mixed_pictures_are_learned_with_mixed_targets(asked):
    torch.manual_seed(0)
    network = models.ConvNet(None, 2, 3, SIZE, (8, 8)).eval()
    memory, masks = MaskMemory(8, levels(3)[0]), MaskHierarchy(levels(3))
    memory.set_batch(torch.arange(8), draw_changes(8, SIZE, Augment(), torch.Generator()))
    loss = MaskLoss(network, network, masks, MaskTraining(mixup_max=0.5, **asked), 0.5, memory=memory, classes=3)
    shown = []
    network.register_forward_hook(lambda module, given, answer: shown.append(given[0].detach()))
    pictures, targets = images(8), torch.arange(8) % 3
    found = loss(pictures, targets, 0.5, torch.Generator().manual_seed(4))
    some, shares = mixed(pictures, F.one_hot(targets, 3).float(), 0.5, torch.Generator().manual_seed(4))
    hidden = (shown[-1] == 0.5).all(1)
    assert torch.equal(shown[-1], apply_masks("picture", some, hidden, 0.5))
    expected = -(shares * network(shown[-1]).log_softmax(1)).sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


COARSE = {"strategy": "greedy", "coarse_grids": [2]}
CLIMBING = {"strategy": "hill-climbing", "climbing_start": 0.4}


@pytest.mark.parametrize("asked", [{"strategy": "greedy"}, CLIMBING, {"random_candidates": 3}, {}])
def test_masks_lie_where_the_pictures_are(asked):
    """On a device without data: whatever lay elsewhere could not meet it."""
    network = models.ConvNet(None, 2, 3, SIZE, (8, 8), depth=3).to("meta")
    memory = MaskMemory(4, levels(3)[0])
    memory.set_batch(torch.arange(4), draw_changes(4, SIZE, Augment(), torch.Generator()))
    masks = MaskHierarchy(levels(2, 3), torch.device("meta"))
    loss = MaskLoss(network, network, masks, MaskTraining(**asked), 0.5, memory=memory)
    found = loss(images(4).to("meta"), torch.arange(4, device="meta") % 3, 0.5, torch.Generator().manual_seed(0))
    assert found.device.type == "meta"
    assert found.shape == ()


def test_of_several_draws_each_picture_gets_the_one_of_largest_loss():
    torch.manual_seed(0)
    network = models.ConvNet(None, 2, 3, SIZE, (8, 8))
    masks, pictures, targets = MaskHierarchy(levels(3)), images(16), torch.arange(16) % 3
    loss = MaskLoss(network, network, masks, MaskTraining(random_candidates=4, random_candidates_start=0.5), 0.5)
    found = masks.hidden(loss.drawn(pictures, targets, 4, torch.Generator().manual_seed(5)))
    assert network.training
    draw = torch.Generator().manual_seed(5)
    tried = torch.stack([masks.hidden(masks.random(16, draw)) for _ in range(4)])
    network.eval()
    losses = torch.stack([
        F.cross_entropy(network(apply_masks("picture", pictures, some)), targets, reduction="none") for some in tried
    ])  # fmt: skip
    assert torch.equal(found, tried[losses.argmax(0), torch.arange(16)])
    expected = F.cross_entropy(network(apply_masks("picture", pictures, found)), targets).item()
    assert loss(pictures, targets, 0.5, torch.Generator().manual_seed(5)).item() == pytest.approx(expected, rel=1e-5)
    one = masks.hidden(masks.random(16, torch.Generator().manual_seed(5)))
    expected = F.cross_entropy(network(apply_masks("picture", pictures, one)), targets).item()
    assert loss(pictures, targets, 0.4, torch.Generator().manual_seed(5)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_an_orthogonal_step_has_singular_values_of_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    kept = values > 0.1 * values[0]
    assert torch.all((torch.linalg.svdvals(found)[: int(kept.sum())] - 1).abs() < 0.45)
    assert F.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.95


def test_muon_moves_hidden_matrices_along_their_directions_and_all_else_as_adamw():
    torch.manual_seed(0)
    network, twin = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(45, 3)) for _ in "ab"
    )
    twin.load_state_dict(network.state_dict())
    optimizer, reference = Muon(network, 0.01, 0.1), torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.1)
    before = network[1].weight.clone()
    for net, steps in ((network, optimizer), (twin, reference)):
        net(images(1, 1)[:, :, :7, :7].expand(4, -1, -1, -1)).square().mean().backward()
        steps.step()
    for name in ("0.weight", "0.bias", "1.bias", "3.weight", "3.bias"):
        assert torch.allclose(network.state_dict()[name], twin.state_dict()[name], atol=1e-7)
    gradient = network[1].weight.grad
    momentum = 0.05 * gradient
    direction = orthogonal((gradient + 0.95 * (momentum - gradient)).flatten(1)).view_as(before)
    expected = before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 36**0.5 * direction
    assert torch.allclose(network[1].weight, expected, atol=1e-6)


TINY = {
    "views": None,
    "model": {"name": "conv", "widths": [8, 8]},
    "defense": "patchcleanser",
    "settings": {"patch": 2, "masks": 3},
    "objective": {},
    "mask_training": COARSE | {"greedy_start": 0.7},
    "holdout": 10,
    "epochs": 10,
    "learning_rate": 0.01,
}


FINER = TINY["settings"] | {"subdivisions": 2, "exit_gap": 0.4}
NULL = TINY["model"] | {"encoding": "null"}
SHARED = {"name": "shared-bagnet", "widths": [8, 8, 8, 8, 8]}
VIT = {"name": "vit", "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": VIT, "epochs": 1},
        {"defense": "patchcure", "model": SHARED, "epochs": 1},
        {"mask_training": CLIMBING, "precision": "bf16-mixed", "epochs": 2},
        {"mask_training": CLIMBING | {"small_mask_fraction": 0.5}, "epochs": 2, "model": NULL, "settings": FINER},
        {"mask_training": COARSE | {"small_mask_fraction": 0.5}, "epochs": 2, "settings": FINER},
        {"defense": "minority-reports", "mask_training": {"strategy": "random"}, "epochs": 1},
    ],
    ids=["conv", "vit", "shared front", "climbing", "finer masks", "finer worst masks",
         "minority reports"],
)  # fmt: skip
def test_recipes_train_any_network(changes, tmp_path):
    data = write_parquet(tmp_path / "data")
    recipe = read(write_recipe(tmp_path / "recipe.yaml", **TINY | changes), [f"data={data}"])
    assert recipe.threat == cp.PatchThreat(2)
    train(recipe, tmp_path / "model")
    defense, card = open_defense(str(tmp_path / "model"))
    assert card.recipe["mask_training"]["strategy"] == (TINY | changes)["mask_training"]["strategy"]
    pictures = cp.data.load(str(data), "test")
    found = defense.certify(pictures.images(range(10)), cp.PatchThreat(2))
    right = found.label == torch.from_numpy(pictures.labels[:10])
    if not changes:
        assert right.double().mean() > 0.8
        assert (right & found.certified).any()
    assert [len(masks) for masks in masks_of(defense, card.image_size)] == ([9, 36] if "settings" in changes else [9])


@pytest.mark.slow
def test_some_batches_learn_under_finer_masks_in_the_end():
    torch.manual_seed(0)
    network = models.ConvNet(None, 2, 3, SIZE, (8, 8), encoding="null")
    larger, small = levels(2)[0], mask_set([THREAT], SIZE, (2, 2), None, [(2, 2)])
    memory = MaskMemory(8, larger)
    memory.set_batch(torch.arange(8), draw_changes(8, SIZE, Augment(), torch.Generator()))
    asked, masks = (
        MaskTraining(strategy="hill-climbing", small_mask_fraction=0.4, small_mask_start=0.5),
        (MaskHierarchy([larger]), MaskHierarchy([small])),
    )
    loss = MaskLoss(network, network, masks[0], asked, 0.5, memory=memory, smaller=masks[1:])
    shown, batches = [], []
    network.register_forward_hook(lambda module, given, answer: shown.append(given[0].detach()))
    for step in range(60):
        loss(images(8), torch.arange(8) % 3, 0.4 if step < 20 else 0.6, torch.Generator().manual_seed(step)).backward()
        hidden = (shown[-1] == 0).all(1)
        fits = [
            ((one[:, None] | one) == hidden[:, None, None]).flatten(3).all(3).any(2).any(1).all()
            for one in (larger, small)
        ]
        assert sum(map(bool, fits)) == 1
        batches.append(bool(fits[1]))
    assert not any(batches[:20])
    assert 8 <= sum(batches) <= 24
    assert torch.isfinite(memory.centres).all()


@pytest.mark.slow
def test_plain_pictures_at_the_end_are_neither_turned_nor_mixed(tmp_path):
    data = write_parquet(tmp_path / "data")
    strong = {"max_shift": 2, "flip": True, "max_rotation": 10, "max_scale": 0.2, "colour_jitter": 0.3}
    runs = {
        "plain": {"augment": {"max_shift": 2, "flip": True}, "mask_training": CLIMBING},
        "at once": {"augment": strong, "mask_training": CLIMBING | {"mixup_max": 0.4}, "strong_augment_end": 0},
        "half way": {"augment": strong, "mask_training": CLIMBING | {"mixup_max": 0.4}, "strong_augment_end": 0.5},
        "never": {"augment": strong, "mask_training": CLIMBING | {"mixup_max": 0.4}},
    }
    weights = {}
    for name, changes in runs.items():
        recipe = read(write_recipe(tmp_path / "recipe.yaml", **TINY | {"epochs": 2} | changes), [f"data={data}"])
        weights[name] = train(recipe, tmp_path / name).sha256
    assert weights["plain"] == weights["at once"]
    assert len(set(weights.values())) == 3


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "masking"),
    [
        ("adamw", TINY["mask_training"]),
        ("muon", {"random_candidates": 2, "random_candidates_start": 0.5, "label_smoothing": 0.1}),
        ("adam", CLIMBING),
        ("adam", CLIMBING | {"small_mask_fraction": 0.5, "small_mask_start": 0.3}),
    ],
    ids=["greedy", "draws", "climbing", "finer masks"],
)
def test_a_stopped_training_ends_with_the_same_weights(optimizer, masking, tmp_path):
    data = write_parquet(tmp_path / "data")
    changes = {"epochs": 3, "optimizer": optimizer, "mask_training": masking, "augment": {"max_shift": 2, "flip": True}}
    changes |= {"settings": FINER} if "small_mask_fraction" in masking else {}
    recipe = read(write_recipe(tmp_path / "recipe.yaml", **TINY | changes), [f"data={data}"])
    whole = train(recipe, tmp_path / "whole")

    def stop(done: int, total: int, text: str) -> None:
        if done > total * 0.8:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, tmp_path / "parts", stop)
    assert train(recipe, tmp_path / "parts").sha256 == whole.sha256


def test_frozen_parts_stay_as_they_were(tmp_path):
    data = write_parquet(tmp_path / "data")
    recipe = read(write_recipe(tmp_path / "start.yaml", **TINY | {"epochs": 1}), [f"data={data}"])
    train(recipe, tmp_path / "start")
    frozen = ["body.0", "body.2", "body.4"]
    changes = {"init_from": str(tmp_path / "start"), "frozen": frozen, "epochs": 1, "seed": 1}
    for masking in (TINY["mask_training"], {"random_candidates": 2}):
        out = tmp_path / f"next-{len(masking)}"
        train(
            read(write_recipe(tmp_path / "next.yaml", **TINY | changes | {"mask_training": masking}), [f"data={data}"]),
            out,
        )
        before, after = (load_file(folder / "weights.safetensors") for folder in (tmp_path / "start", out))
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if name.startswith(tuple(f"{part}." for part in frozen))}
    with pytest.raises(InputError, match="no part 'neck'; it has body"):
        train(read(tmp_path / "next.yaml", [f"data={data}", 'frozen=["neck"]']), tmp_path / "other")


def test_recipes_that_make_no_sense_are_refused_and_others_keep_their_identity():
    fields = {"name": "n", "data": "d", "epochs": 1, "model": {"name": "conv"}, "defense": "patchcleanser"}
    assert "mask_training" not in Recipe(**fields).model_dump(exclude_defaults=True)
    for changes, message in (({"defense": "undefended", "mask_training": {}}, "training under masks is for patchcleanser"),
                             ({"mask_training": {}, "objective": {"patch": 3}}, "mask_training stands instead of objective"),
                             ({"mask_training": {"coarse_grids": [3]}}, "belongs to strategy: greedy"),
                             ({"mask_training": {"strategy": "greedy", "coarse_grids": [4, 2]}}, "from few masks per axis"),
                             ({"mask_training": {"climbing_start": 0.5}}, "belongs to strategy: hill-climbing"),
                             ({"mask_training": {"small_mask_fraction": 0.5}}, "for a defense with smaller masks"),
                             ({"mask_training": {"strategy": "best"}}, "'random', 'greedy' or 'hill-climbing'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Recipe(**fields | changes)


def test_shipped_recipes_are_read():
    names = ("mnist-double-mask", "mnist-double-mask-144", "cifar10-double-mask", "imagenette-double-mask")
    names += ("imagenette-double-mask-random",)
    names += ("cifar10-double-mask-null", "cifar10-double-mask-wide", "cifar10-whole")
    numbers = ([36, 144], [144], [16, 49, 196], [16, 64], [16], [49, 196], [49], [784])
    for name, masks in zip(names, numbers, strict=True):
        recipe = read(cp_recipe(name))
        size = (28, 28) if name.startswith("mnist") else (32, 32) if name.startswith("cifar") else (224, 224)
        asked = {name: recipe.settings.get(name) for name in ("masks", "stride", "subdivisions")}
        defense = defenses.PatchCleanser(nn.Identity(), recipe.threat, **asked)
        assert [len(found) for found in masks_of(defense, size)] == masks


def cp_recipe(name: str):
    from certipatch.plumbing import resources

    return resources.find("recipes", f"{name}.yaml")
