"""Certified training: its bounds and gradients are those of all places, what it draws, resuming, recipes, tables."""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import write_parquet
from typer.testing import CliRunner

from certipatch import saved
from certipatch.bounds import patch_margins, regions, sparse
from certipatch.bounds.propagate import layout
from certipatch.bounds.worst import block_margins, places, worst
from certipatch.cli import app
from certipatch.data import load
from certipatch.errors import InputError
from certipatch.models import CNN, MLP
from certipatch.models.unet import UNet
from certipatch.plumbing import resources
from certipatch.reproduce import TABLES
from certipatch.reproduce.interval_models import MODELS, IntervalModel, trained
from certipatch.threats import PatchThreat
from certipatch.training import interval, read, train
from certipatch.training.recipe import IntervalTraining
from certipatch.training.train import _rate

NETWORKS = {
    "one hidden layer": (lambda: MLP(1, 4, (10, 12), (17,)), (1, 10, 12)),
    "two, colour": (lambda: MLP(3, 4, (10, 9), (17, 8)), (3, 10, 9)),
    "many classes": (lambda: MLP(1, 20, (9, 9), (13,)), (1, 9, 9)),
    "convolutions": (lambda: CNN(2, 3, (12, 12), 4, widths=(3, 3, 4, 4, 9, 8)), (2, 12, 12)),
}
THREATS = [PatchThreat(3), PatchThreat((2, 4)), PatchThreat(5, shape="line"), PatchThreat(6, shape="rectangle")]
TINY = {"name": "tiny", "model": {"name": "mlp", "widths": [16]}, "holdout": 20, "batch_size": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("data") / "stripes")


def setting(name: str, seed: int = 0):
    torch.manual_seed(seed)
    build, picture = NETWORKS[name]
    network = build().double()
    return network, picture, torch.rand(6, *picture).double(), torch.randint(0, 3, (6,))


def recipe(folder: Path, data: Path, **asked: object):
    own = {key: asked.pop(key) for key in ("epochs", "learning_rate", "seed") if key in asked}
    values = TINY | {"epochs": 2, "data": str(data), "interval": {"patch": 2, **asked}} | own
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return read(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_worst_places_are_those_of_certification_and_their_gradient_that_of_all(name):
    network, picture, images, label = setting(name)
    parameters = list(network.parameters())
    found = layout(network, picture)
    for threat, strength in zip(THREATS, (1.0, 0.3, 1.0, 0.6), strict=True):
        where = places(threat, picture[1:])
        every = patch_margins(network, images, label, where.regions, strength=strength)
        low, at = worst(found.passage(), images, label, where, strength)
        torch.testing.assert_close(low, every.amin(1))
        torch.testing.assert_close(every.gather(1, at[:, None])[:, 0], low)
        margins = interval.worst_margins(found, images, label, where, strength)
        own = torch.autograd.grad(interval.bound_loss(margins), parameters)
        plain = torch.autograd.grad(interval.bound_loss(every.amin(1)), parameters)
        assert any(bool((gradient != 0).any()) for gradient in plain)
        torch.testing.assert_close(own, plain)


def test_some_places_only():
    network, picture, images, label = setting("one hidden layer")
    where, index = places(THREATS[0], picture[1:]), torch.tensor([5, 40, 7])
    low, at = worst(layout(network, picture).passage(), images, label, where, 1.0, index)
    every = patch_margins(network, images, label, where.regions, index=[5, 40, 7])
    torch.testing.assert_close(low, every.amin(1))
    assert set(at.flatten().tolist()) <= {5, 40, 7}


@pytest.mark.parametrize(
    ("name", "sides"),
    [("one hidden layer", (2,)), ("two, colour", (2, 2)), ("two, colour", (3,)), ("convolutions", (2, 2))],
)
def test_pooled_bounds_hold_those_of_every_place(name, sides):
    network, picture, images, label = setting(name)
    where, passed = places(PatchThreat(3), picture[1:], sides), layout(network, picture).passage()
    assert where.blocks.unique().tolist() == list(range(len(where.regions)))
    every = patch_margins(network, images, label, where.regions)
    low, at = worst(passed, images, label, where)
    classes = every.shape[2]
    picked = torch.arange(6).repeat_interleave(len(where)), torch.arange(len(where)).repeat(6)
    margins = block_margins(passed, images, label, where, *picked).view(6, len(where), classes)
    assert bool((margins[:, :, None] <= every[:, where.blocks] + 1e-12).all())
    assert bool((margins[:, :, None] < every[:, where.blocks] - 1e-6).any())
    torch.testing.assert_close(low, margins.amin(1))
    torch.testing.assert_close(margins.gather(1, at[:, None])[:, 0], low)


def test_what_cannot_be_pooled_is_told():
    network, picture, images, label = setting("one hidden layer")
    where = places(PatchThreat(3), picture[1:], (2, 2))
    with pytest.raises(InputError, match="pooled in 2 layers"):
        worst(layout(network, picture).passage(), images, label, where)
    with pytest.raises(InputError, match="no grid"):
        places(PatchThreat(5, shape="line"), (10, 12), (2,))


@pytest.mark.parametrize(("channels", "pixels"), [(1, 3), (3, 2), (1, 30)])
def test_sparse_bounds_are_the_same_whichever_pixels_are_tried_first(monkeypatch, channels, pixels):
    torch.manual_seed(channels)
    network = MLP(channels, 4, (12, 12), (11,)).double()
    images = (1.5 * torch.rand(7, channels, 12, 12) - 0.5).clamp(0, 1).double()
    label, found = torch.randint(0, 4, (7,)), []
    for tried in (10_000, 1):
        monkeypatch.setattr(sparse, "CANDIDATES", tried)
        margins = sparse.sparse_margins(network, images, label, pixels, strength=0.7)
        found.append((margins, *torch.autograd.grad(margins.sum(), list(network.parameters()))))
    torch.testing.assert_close(found[0], found[1])
    weight = network.body[1].weight.unflatten(1, (channels, -1))
    rise, fall = (0.7 * (1 - images)).flatten(2), (0.7 * images).flatten(2)
    gain = (weight.clamp(min=0) * rise[:, None] - weight.clamp(max=0) * fall[:, None]).sum(2)
    own = sparse._most_of_linear(weight, rise, fall, pixels)
    torch.testing.assert_close(own, gain.sort(dim=-1, descending=True).values[..., :pixels].sum(-1))


def test_places_are_drawn_by_the_softmax_of_what_the_unet_predicts():
    predicted = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 2.0, 0.0]]])
    noise = torch.rand(1, 20_000, 3, generator=torch.Generator().manual_seed(0))
    chosen = interval.drawn_places(predicted, 20_000, noise)[0]
    for label in (0, 1):
        shares = torch.bincount(chosen[label::2], minlength=3) / 10_000
        torch.testing.assert_close(shares, torch.softmax(-predicted[0, label], 0), atol=0.02, rtol=0)


@pytest.mark.slow
def test_the_unet_keeps_sizes_and_learns_margins():
    torch.manual_seed(0)
    assert UNet(3, 5)(torch.rand(2, 3, 13, 10)).shape == (2, 5, 13, 10)
    network = MLP(1, 3, (12, 12), (9,))
    asked = IntervalTraining(strategy="guided", patch=3, sampled_locations=6)
    objective = interval.IntervalObjective(network, asked, (1, 12, 12), 3)
    images, target, draw = torch.rand(16, 1, 12, 12), torch.randint(0, 3, (16,)), torch.Generator().manual_seed(0)
    optimizer, errors = torch.optim.Adam(objective.guide.parameters(), 0.01), []
    for _ in range(60):
        optimizer.zero_grad()
        _, error = objective._guided(images, target, 1.0, objective.guide(images), draw)
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-5:]) < 0.6 * sum(errors[:5])


def test_random_places_become_all_of_them():
    torch.manual_seed(0)
    network, images, target = MLP(1, 3, (12, 12), (9,)), torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 2, 0])
    draw = torch.Generator().manual_seed(0)
    few = IntervalTraining(strategy="random", patch=3, sampled_locations=2, all_start=0.8)
    every = interval.IntervalObjective(network, IntervalTraining(patch=3), (1, 12, 12), 3)(images, target, 0.9, draw)
    objective = interval.IntervalObjective(network, few, (1, 12, 12), 3)
    assert objective(images, target, 0.79, draw) < every
    assert torch.equal(objective(images, target, 0.8, draw), every)


def test_intervals_grow_and_the_rate_is_halved_as_in_the_paper(tmp_path, data):
    asked = recipe(tmp_path, data, ramp_start=0.1, ramp_end=0.5)
    strengths = [asked.interval.strength(share) for share in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert strengths == pytest.approx([0, 0, 0.5, 1, 1])
    assert [_rate(asked, share) for share in (0.0, 0.55, 0.65, 0.95)] == [1, 1, 0.5, 0.0625]
    assert (asked.optimizer, asked.weight_decay, asked.learning_rate) == ("adam", 0, 5e-4)


@pytest.mark.parametrize("strategy", ["all", "random", "guided", "pooled", "sparse", "natural"])
def test_every_strategy_trains_and_loads(tmp_path, data, strategy):
    asked = recipe(tmp_path, data, strategy=strategy, sampled_locations=3)
    train(asked, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {"clean_loss", "bound_loss", "clean_accuracy", "certified_accuracy"} <= lines[-1].keys()
    assert load_file(tmp_path / "out" / "weights.safetensors").keys() == MLP(1, 3, (12, 12), (16,)).state_dict().keys()
    defense = saved.load(str(tmp_path / "out"))
    assert defense.name == "interval-bounds"


@pytest.mark.slow
def test_training_certifies_what_certification_does(tmp_path, data):
    settings = {"epochs": 12, "learning_rate": 0.01, "ramp_end": 0.5}
    train(recipe(tmp_path, data, **settings), tmp_path / "out")
    train(recipe(tmp_path, data, strategy="natural", **settings), tmp_path / "natural")
    held = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    natural = json.loads((tmp_path / "natural" / "log.jsonl").read_text().splitlines()[-1])
    assert held["certified_accuracy"] > 0.6
    assert held["bound_loss"] < natural["bound_loss"]
    pictures = load(str(data), "train")
    images, target = pictures.images(range(80, 100)), torch.from_numpy(pictures.labels[80:])
    found = saved.load(str(tmp_path / "out")).certify(images, PatchThreat(2))
    right = found.label == target
    assert right.double().mean().item() == held["clean_accuracy"]
    assert (right & found.certified).double().mean().item() == held["certified_accuracy"]


@pytest.mark.slow
def test_a_guided_training_that_was_stopped_ends_with_the_same_weights(tmp_path, data, monkeypatch):
    monkeypatch.setattr(importlib.import_module("certipatch.training.train"), "CHECKPOINT_SECONDS", -1.0)
    asked = recipe(tmp_path, data, strategy="guided", sampled_locations=3, ramp_end=0.3)
    train(asked, tmp_path / "whole")

    def stop(done: int, total: int, text: str) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(asked, tmp_path / "stopped", stop)
    names = load_file(tmp_path / "stopped" / "checkpoint.safetensors").keys()
    assert any(name.startswith("network.guide.") for name in names)
    train(asked, tmp_path / "stopped")
    whole, stopped = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("interval.strategy=some", "interval.strategy"),
        ("interval.patch=40", "does not fit"),
        ("interval.ramp_start=0.9", "cannot be whole"),
        ("defense=undefended", "is for interval-bounds"),
        ("objective.views_per_step=2", "instead of objective"),
        ("interval=null", "views"),
        ("model.name=conv", "cannot be traced"),
    ],
)
def test_bad_recipes_are_told_in_one_line(tmp_path, data, change, message):
    recipe(tmp_path, data)
    with pytest.raises(InputError, match=message) as error:
        train(read(tmp_path / "recipe.yaml", [change]), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_an_ensemble_is_bounded_in_one(tmp_path, data):
    """Its margins are the mean of its members', where the bounds of its logits would give less."""
    for seed in (0, 1):
        train(recipe(tmp_path, data, seed=seed), tmp_path / f"{seed}")
    starts = [str(tmp_path / f"{seed}") for seed in (0, 1)]
    model = {"name": "ensemble", "members": [TINY["model"]] * 2}
    asked = {**TINY, "data": str(data), "interval": {"patch": 2}, "model": model, "init_from": starts, "epochs": 0}
    (tmp_path / "both.yaml").write_text(json.dumps(asked), encoding="utf-8")
    train(read(tmp_path / "both.yaml"), tmp_path / "both")
    images = load(str(data), "test", limit=6).images(range(6))
    label = torch.from_numpy(load(str(data), "test", limit=6).labels[:6])
    found = regions(PatchThreat(2), (images.shape[2], images.shape[3]))
    one, two, both = (
        patch_margins(saved.load(f).model, images, label, found, dtype=torch.float64)
        for f in (*starts, tmp_path / "both")
    )
    assert torch.allclose(both, (one + two) / 2, 0, 1e-6)


def test_recipes_without_intervals_are_as_they_were():
    path = resources.find("recipes", "cifar10-columns.yaml")
    assert path is not None
    kept = read(path).model_dump(mode="json", exclude_defaults=True)
    assert not {"interval", "halving_interval", "optimizer", "defense"} & kept.keys()


def test_every_model_of_the_tables_has_a_name_of_its_own_and_a_command_that_describes_it():
    names = [
        (m.name, m)
        for data in ("mnist", "cifar10")
        for n in ("mlp", "cnn4")
        for s in MODELS.strategies
        if s != "sparse"
        for m in (trained(data, n, s, 5),)
    ]
    assert len({name for name, _ in names}) == len(names)
    sparse_models = [IntervalModel(data, "mlp", "sparse", k) for data in ("mnist", "cifar10") for k in (1, 4)]
    for _, model in [*names, *((m.name, m) for m in sparse_models)]:
        _, _, base, *rest = shlex.split(model.command)
        path = resources.find("recipes", f"{base}.yaml")
        assert path is not None
        found = read(path, [text for text in rest if text != "--set"])
        assert (found.name, found.data) == (model.name, model.data)
        assert found.interval.strategy == model.strategy
        if model.strategy == "random":
            shipped = {"mnist": (144, 0.7), "cifar10": (20, 0.8)}[model.data]  # places; where all follow on 144
            assert found.interval.sampled_locations == (model.count or shipped[0])
            assert found.interval.all_start == (shipped[1] if model.count == 144 else 1)
        assert (found.interval.pixels if model.strategy == "sparse" else found.interval.patch) == model.size


@pytest.mark.slow
def test_tables_print_what_was_measured_and_what_was_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CERTIPATCH_DATA", raising=False)
    monkeypatch.setattr("certipatch.reproduce.context.resources", SimpleNamespace(find=lambda *_: None))
    data = write_parquet(tmp_path / "mnist", (28, 28))
    asked = recipe(tmp_path, data, epochs=1)
    train(asked, tmp_path / "models" / "mnist-ibp-5-mlp")
    for name in (f"ibp-table{number}" for number in range(2, 8)):  # attacks, and table 8, have tests of their own
        assert name in TABLES
        done = CliRunner().invoke(app, ["reproduce", name, "--data", str(data), "--limit", "6", "--json"])
        assert done.exit_code == 0, done.output
        table = json.loads(done.stdout)
        assert any(row["source"] == "paper" for row in table["rows"])
        assert any("certipatch train" in note for note in table["notes"])
    cells = {
        row["label"]: row["cells"]
        for row in json.loads((tmp_path / "runs/reproduce/ibp-table5/table.json").read_text())["rows"]
        if row["source"] != "paper"
    }
    measured = cells["25 pixels, MLP(255), Random(144), then all"]
    assert [cell["n"] for cell in measured] == [6] * 5
    assert "not run" in json.dumps(cells["4 pixels, MLP(255), Random(144), then all"])
    defense, pictures = saved.load(str(tmp_path / "models" / "mnist-ibp-5-mlp")), load(str(data), "test", limit=6)
    found = defense.certify(pictures.images(range(6)), PatchThreat(25, shape="diamond"))
    right = found.label == torch.from_numpy(pictures.labels[:6])
    assert measured[3]["share"] == (right & found.certified).double().mean().item()
    assert [study.data for study in TABLES["ibp-table5"].studies.values()] == ["mnist", "cifar10"]
