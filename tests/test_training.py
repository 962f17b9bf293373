"""Training: every network learns, a killed training ends with the same weights, bad recipes name the field."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import write_parquet, write_recipe
from torch import nn

from certipatch import saved
from certipatch.errors import InputError
from certipatch.models import EfficientNetLite
from certipatch.models.adapters import Adapted, Preprocessing
from certipatch.plumbing import resources
from certipatch.plumbing.devices import training_layout
from certipatch.rules import RobustMask, Vote, Windows
from certipatch.saved import card as cards
from certipatch.saved.card import load_defense
from certipatch.saved.weights import restored, save_weights, sha256, write_tensors
from certipatch.threats import PatchThreat
from certipatch.training import objectives, read, train
from certipatch.training.augment import draw_changes
from certipatch.training.recipe import Augment, IntervalTraining, MaskTraining, Objective, Recipe
from certipatch.training.start import start_from
from certipatch.views import Columns, Cross
from certipatch.views.incidence import sees


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("data") / "stripes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "objective", "epochs"),
    [
        ({"name": "strip", "widths": [8, 8]}, {"views_per_step": "all", "vote_margin_weight": 1.0, "patch": 2}, 6),
        ({"name": "crop", "widths": [8, 8], "depth": 1}, {"views_per_step": 4}, 12),
        ({"name": "resnet18", "widths": [8, 8], "depth": 1}, {"views_per_step": 1}, 25),
    ],
)
def test_every_network_learns_and_loads(tmp_path, data, model, objective, epochs):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(data), model=model, objective=objective, epochs=epochs)
    card = train(read(recipe), tmp_path / "out")
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert last["clean_accuracy"] > 0.9
    defense, again = saved.open_defense(str(tmp_path / "out"))
    assert again == card
    assert again.training["steps"] == epochs * 5
    assert defense.predict(torch.rand(2, 1, 12, 12)).shape == (2,)


def test_a_finished_training_is_left_alone_and_another_one_refused(tmp_path, data):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(data), epochs=1)
    train(read(recipe), tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    train(read(recipe), tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(InputError, match="another training"):
        train(read(recipe, ["seed=1"]), tmp_path / "out")


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_weights(tmp_path, data):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(data), epochs=8)
    train(read(recipe), tmp_path / "whole")
    command = [sys.executable, "-m", "certipatch", "train", str(recipe), "--out", str(tmp_path / "killed")]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = tmp_path / "killed" / "log.jsonl"
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) > lines:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    whole, killed = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
def test_a_full_disk_loses_only_the_last_minute(tmp_path, data, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(data), epochs=3)
    train(read(recipe), tmp_path / "whole")
    write, written = Path.write_bytes, []

    def full(self, content):
        written.append(self)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        train(read(recipe), tmp_path / "full")
    assert (tmp_path / "full" / "checkpoint.safetensors").exists()
    train(read(recipe), tmp_path / "full")
    assert (tmp_path / "full" / "weights.safetensors").read_bytes() == (
        tmp_path / "whole" / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs=0", "epochs"),
        ("views.width=0", "views.width"),
        ("views.colour=3", "views.colour"),
        ("model.name=vgg", "model.name"),
        ("objective.views_per_step=2", "vote_margin_weight needs"),
        ("epochs", "key=value"),
        ("holdout=1000", "holdout"),
        ("views.width=40", "does not fit"),
        ("objective.patch=40", "does not fit"),
        ("split=nothing", "test"),
        ("augment.crop=33", "a bagnet without resize"),
    ],
)
def test_bad_recipes_are_told_in_one_line(tmp_path, data, change, message):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(data))
    with pytest.raises(InputError, match=message) as error:
        train(read(recipe, [change]), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_margin_of_true_votes_is_what_the_rule_certifies():
    generator = torch.Generator().manual_seed(0)
    votes = torch.rand(20, 12, 4, generator=generator) < 0.4
    relation = sees(Columns(3), PatchThreat(2), (8, 12)).rows
    verdict = Vote().certify(votes, relation)
    margin = objectives.worst_vote_margin(votes.double(), verdict.label, relation)
    earlier = (torch.arange(4) < verdict.label[:, None]).double()[:, None]
    assert torch.equal((margin - earlier).amin(2) + 1, verdict.margin)


def test_the_vote_margin_loss_falls_as_the_right_class_gains():
    relation = sees(Columns(3), PatchThreat(2), (8, 12)).rows
    target = torch.tensor([1])
    losses = []
    for strength in (0.0, 1.0, 3.0, 9.0):
        logits = torch.zeros(1, 12, 3)
        logits[..., 1] = strength
        losses.append(objectives.vote_margin_loss(logits, target, relation, 0.3).item())
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_the_mask_margin_is_what_the_rule_certifies_and_splits_over_columns_and_rows():
    generator = torch.Generator().manual_seed(0)
    size, threat, views = (8, 12), PatchThreat(2), Cross(3)
    scores = torch.rand(20, 20, 4, generator=generator, dtype=torch.float64)
    relation = sees(views, threat, size)
    rows = relation.rows[relation.undominated]
    verdict = RobustMask(Windows.from_masks(rows)).certify(scores, rows)
    margin = objectives.worst_mask_margin(scores, verdict.label, rows, rows).amin((1, 2))
    torch.testing.assert_close(20 * margin, verdict.margin.amin(1))
    families = []
    for part in views.parts:
        found = sees(part, threat, size)
        families.append((found.rows[found.undominated],) * 2)
    # The mean of a column's and a row's share; families of 12 and 8 views differ from the share of all 20.
    shares = [
        objectives.worst_mask_margin(scores[:, index], verdict.label, *family)
        for index, family in zip((slice(12), slice(12, 20)), families, strict=True)
    ]
    expected = ((shares[0][:, :, None] + shares[1][:, None]) / 2).amin((1, 2, 3))
    loss = objectives.mask_margin_loss(scores, verdict.label, families, 1e-4, 10.0)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-10 * expected).mean(), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_cross_trains_with_the_mask_margin(tmp_path, data):
    objective = {"views_per_step": "all", "cross_entropy_weight": 0.3, "mask_margin_weight": 1.0, "patch": 2}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        data=str(data),
        defense="patchguard",
        settings={"score_type": "sigmoid", "patch": 2, "ignore_threat": True},
        views={"name": "cross", "width": 3},
        objective=objective,
    )
    train(read(recipe), tmp_path / "out")
    defense = saved.load(str(tmp_path / "out"), PatchThreat(1))
    assert defense.threat == PatchThreat(2)
    assert len(defense.views_of((12, 12)).visible((12, 12))) == 24


@pytest.mark.parametrize("owner", [Recipe, Objective, IntervalTraining, MaskTraining, Augment])
def test_an_old_key_of_a_recipe_is_refused_in_one_line_with_the_new_one(owner, tmp_path):
    place = {Objective: "objective", IntervalTraining: "interval", MaskTraining: "mask_training", Augment: "augment"}
    inside = f"{place[owner]}." if owner in place else ""
    for old, new in owner.renamed.items():
        key, _, value = old.partition(": ")
        recipe = write_recipe(tmp_path / "r.yaml", data="mnist")
        with pytest.raises(InputError) as error:
            read(recipe, [f"{inside}{key}={value or 0.5}"])
        assert str(error.value) == f"{recipe}: {place.get(owner, 'recipe')}: {old} has a new name: use {new}"
        assert new.partition(":")[0] in owner.model_fields


@pytest.mark.slow
def test_a_training_that_starts_from_a_trained_model(tmp_path, data):
    recipe = write_recipe(tmp_path / "r.yaml", data=str(data), epochs=1)
    train(read(recipe), tmp_path / "first")
    start = f"init_from={tmp_path / 'first'}"
    train(read(recipe, [start, "learning_rate=1e-9", "weight_decay=0"]), tmp_path / "second")
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("first", "second"))
    for name, value in first.items():
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(second[name], value, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="another network"):
        train(read(recipe, [start, "model.widths=[8, 4]"]), tmp_path / "third")
    with pytest.raises(InputError, match="unknown defense"):
        train(read(recipe, ["init_from=nowhere"]), tmp_path / "fourth")
    with pytest.raises(InputError, match="another training"):
        train(read(recipe, ["learning_rate=1e-9", "weight_decay=0"]), tmp_path / "second")


@pytest.mark.slow
def test_a_training_that_starts_from_imagenet(tmp_path, data, monkeypatch):
    """With the rows of the last layer whose classes it knows; only where the network is that one."""
    given = EfficientNetLite(3, 1000)
    adapter = Adapted(given.eval(), Preprocessing(classes=tuple(map(str, range(1000)))), "imagenet-lite")
    monkeypatch.setattr(sys.modules[start_from.__module__], "open_model", lambda name: adapter)
    network = EfficientNetLite(3, 2).eval()
    start_from("imagenet-lite", network, ("7", "3"))
    pictures = torch.rand(1, 3, 40, 40)
    torch.testing.assert_close(network(pictures), given(pictures)[:, [7, 3]])
    start_from("imagenet-lite", network, ("church", "tench"))  # classes of their own: a last layer of their own
    recipe = write_recipe(tmp_path / "r.yaml", data=str(data), model={"name": "conv", "widths": [4, 4]}, epochs=1)
    with pytest.raises(InputError, match=r"use model\.name=efficientnet-lite0"):
        train(read(recipe, ["init_from=imagenet-lite"]), tmp_path / "other")


SIZES = {"mnist": (1, 28), "fashion-mnist": (1, 28), "cifar10": (3, 32), "imagenette": (3, 224)}


@pytest.mark.parametrize("name", resources.resource_names("recipes", "*.yaml"))
def test_every_recipe_describes_a_network(name):
    path = resources.find("recipes", name)
    assert path is not None
    recipe = read(path)
    assert name == f"{recipe.name}.yaml"
    channels, side = SIZES.get(recipe.data, (3, recipe.resize[0] if recipe.resize else 64))
    with torch.device("meta"):
        network = recipe.model.build(recipe.created_views(), channels, 10, (side, side))
    assert sum(p.numel() for p in network.parameters()) > 0


@pytest.mark.slow
def test_a_cross_that_starts_from_its_columns_and_rows_and_takes_evenly_spaced_views(tmp_path, data):
    shared = {"data": str(data), "model": {"name": "conv", "widths": [4, 6]}, "epochs": 1}
    starts = []
    for name in ("columns", "rows"):
        recipe = write_recipe(tmp_path / f"{name}.yaml", **shared, views={"name": name, "width": 3})
        train(read(recipe), tmp_path / name)
        starts.append(str(tmp_path / name))
    recipe = write_recipe(
        tmp_path / "cross.yaml",
        **shared,
        views={"name": "cross", "width": 3},
        defense="patchguard",
        settings={"patch": 2},
        objective={"views_per_step": 8, "mask_margin_weight": 1.0, "margin_start": 0, "patch": 2},
        init_from=starts,
        learning_rate=1e-9,
        weight_decay=0,
    )
    train(read(recipe), tmp_path / "cross")
    both = load_file(tmp_path / "cross" / "weights.safetensors")
    for part, start in enumerate(starts):
        for name, value in load_file(f"{start}/weights.safetensors").items():
            if "running" not in name and "batches" not in name:
                torch.testing.assert_close(both[f"parts.{part}.{name}"], value, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="cannot be evenly spaced among 24 views"):
        train(read(recipe, ["objective.views_per_step=7"]), tmp_path / "uneven")
    with pytest.raises(InputError, match="several models are for an ensemble, or a cross"):
        train(read(recipe, ["views.name=columns"]), tmp_path / "no-cross")


WHOLE = {"views": None, "defense": "patchcleanser", "settings": {"patch": 2, "masks": 3}, "objective": {}}
MEMBERS = [{"name": "conv", "widths": [4, 6], "flip_tta": True}, {"name": "resnet18", "widths": [4, 6], "depth": 1}]


@pytest.mark.slow
def test_an_ensemble_of_trained_models_answers_with_the_mean(tmp_path, data):
    shared = WHOLE | {"data": str(data)}
    starts, networks = [], []
    members = [{"name": "conv", "widths": [5, 7], "stride": 2}, MEMBERS[0]]
    for number, member in enumerate(members):
        recipe = write_recipe(tmp_path / f"{number}.yaml", **shared, model=member, epochs=1)
        train(read(recipe), tmp_path / str(number))
        starts.append(str(tmp_path / str(number)))
        networks.append(load_defense(tmp_path / str(number))[0].model.model)
    both = {"name": "ensemble", "members": members}
    recipe = write_recipe(tmp_path / "both.yaml", **shared, model=both, init_from=starts, epochs=0)
    images = torch.rand(6, 1, 12, 12)
    expected = sum(network(images) for network in networks) / 2
    for stored, off in (("float32", 1e-6), ("float16", 1e-2), ("int8", 5e-2)):
        card = train(read(recipe, [f"weight_dtype={stored}"]), tmp_path / stored)
        assert card.training["steps"] == 0
        defense, _ = load_defense(tmp_path / stored)
        assert (defense.model.model(images) - expected).abs().max() < off * expected.abs().max()
        assert defense.certify(images, PatchThreat(2)).certified.shape == (6,)
    first = both | {"name": "cascade", "exit_gap": 0.3}
    train(read(recipe, [f"model={json.dumps(first)}"]), tmp_path / "cascade")
    defense, card = load_defense(tmp_path / "cascade", changes={"min_mean_gap": 0.2})
    assert (card.model.exit_gap, defense.min_mean_gap) == (0.3, 0.2)
    networks = defense.model.model.parts
    assert torch.allclose(networks[0](images), load_defense(tmp_path / "0")[0].model.model(images), atol=1e-6)
    assert defense.certify(images, PatchThreat(2)).certified.shape == (6,)
    for changes, message in (
        (["model.members=[{name: conv, widths: [5, 7], stride: 2}]"], "at least 2 items"),
        ([f"init_from=['{starts[0]}', '{starts[1]}', '{starts[1]}']"], "has 2 parts, but 3 models are given"),
        ([f"init_from=['{starts[1]}', '{starts[0]}']"], "holds another network"),
        (["model.widths=[4]"], "the ensemble network has no 'widths'; it has name, members"),
        (["model.confident=0.5", "model.name=cascade"], "confident has a new name: use exit_gap"),
        (["model.members=[{name: conv}, {name: vit}]"], "the ensemble cannot have vit as a member"),
        (["init_from=null"], "epochs: 0 trains nothing"),
    ):
        with pytest.raises(InputError, match=message):
            train(read(recipe, changes), tmp_path / "refused")


@pytest.mark.slow
def test_an_ensemble_learns_as_one_network(tmp_path, data):
    shared = WHOLE | {"data": str(data)}
    recipe = write_recipe(
        tmp_path / "r.yaml", **shared, model={"name": "ensemble", "members": [MEMBERS[0], MEMBERS[0]]}, epochs=2
    )
    for name, members in (("alike", [MEMBERS[0]] * 2), ("one NULL-encoded", MEMBERS)):
        train(
            read(recipe, ["mask_training.strategy=hill-climbing", f"model.members={json.dumps(members)}"]),
            tmp_path / name,
        )
        before, after = (json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines())
        assert after < before, name


def test_weights_in_eight_bits_are_as_near_as_their_steps(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        network[3].weight[1] = 0
        network[0].weight[2] *= 1e6
    save_weights(tmp_path, network, "int8")
    stored = load_file(tmp_path / "weights.safetensors")
    assert stored["0.weight"].dtype == stored["3.weight"].dtype == torch.int8
    found = restored(stored)
    assert found.keys() == network.state_dict().keys()
    for name, weight in network.state_dict().items():
        if weight.dim() < 2:
            assert torch.equal(found[name], weight)
        else:
            step = weight.flatten(1).abs().amax(1) / 127
            off = (found[name] - weight).flatten(1).abs().amax(1)
            assert (off <= step * 0.5001).all()
            assert off.max() > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("body.0.bias"),
        lambda tensors: tensors.update({"body.0.weight:scale": torch.ones(1)}),
        lambda tensors: tensors.update({"body.0.bias:scale": torch.ones(2)}),
        lambda tensors: tensors.update({"other:scale": torch.ones(2)}),
        lambda tensors: tensors.update({"body.3.num_batches_tracked:scale": torch.ones(())}),
    ],
)
def test_foreign_scales_are_refused(change, tmp_path, data):
    shared = WHOLE | {"data": str(data)}
    recipe = write_recipe(tmp_path / "r.yaml", **shared, model=MEMBERS[0], epochs=1, weight_dtype="int8")
    card = train(read(recipe), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "weights.safetensors")
    change(tensors)
    write_tensors(tmp_path / "m" / "weights.safetensors", tensors)
    cards.write(tmp_path / "m", card.model_copy(update={"sha256": sha256(tmp_path / "m" / "weights.safetensors")}))
    with pytest.raises(InputError, match="does not hold the weights of conv"):
        load_defense(tmp_path / "m")


LOCAL = {
    "defense": "patchguard",
    "views": None,
    "settings": {"score_type": "logits", "patch": 4},
    "model": {"name": "bagnet", "receptive_field": 9, "widths": [4, 4, 4, 4], "depths": [1, 1, 1, 1]},
    "objective": {
        "views_per_step": "all",
        "cross_entropy_weight": 0.0,
        "pooled_cross_entropy_weight": 1.0,
        "masked_cross_entropy_weight": 1.0,
    },
}


def test_crops_are_parts_of_their_pictures(tmp_path, data):
    recipe = read(write_recipe(tmp_path / "r.yaml", data=str(data), **LOCAL, augment={"crop": 33}))
    images = torch.arange(2 * 40 * 50).view(2, 1, 40, 50)  # every pixel has a number of its own
    corners = set()
    for seed in range(200):
        cut = draw_changes(2, (40, 50), recipe.augment, torch.Generator().manual_seed(seed)).of(images)
        assert cut.shape == (2, 1, 33, 33)
        for picture in range(2):
            top, left = divmod(int(cut[picture, 0, 0, 0]) - 2000 * picture, 50)
            assert torch.equal(cut[picture, 0], images[picture, 0, top : top + 33, left : left + 33])
            corners.add((top, left))
    assert {top for top, _ in corners} == set(range(8))
    assert {left for _, left in corners} == set(range(18))


@pytest.mark.slow
def test_a_bagnet_learns_from_crops_and_reads_whole_pictures(tmp_path):
    folder = write_parquet(tmp_path / "data", (40, 48))
    recipe = write_recipe(tmp_path / "r.yaml", data=str(folder), **LOCAL, augment={"crop": 33}, epochs=1)
    card = train(read(recipe), tmp_path / "out")
    assert card.image_size == (40, 48)
    defense, _ = saved.open_defense(str(tmp_path / "out"), None, PatchThreat(4), {})
    assert defense.certify(torch.rand(2, 1, 40, 48), PatchThreat(4)).margin.shape[0] == 2
    with pytest.raises(InputError, match=r"augment\.crop: 41 pixels do not fit pictures of 40x48"):
        train(read(recipe, ["augment.crop=41"]), tmp_path / "larger")


def test_a_layout_that_corrupts_memory_is_not_taken():
    """oneDNN's gradient of a strided 1x1 convolution of fewer than 8 channels, channels last."""
    for channels, layout in ((4, torch.contiguous_format), (8, torch.channels_last)):
        network = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 6, 1, stride=2))
        assert training_layout(network) is layout
    assert training_layout(nn.Sequential(nn.Conv2d(4, 6, 1))) is torch.channels_last
