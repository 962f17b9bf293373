"""Tables and figures of the smoothing paper, from tiny models: right numbers, from the right half, chosen on the other."""

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import write_parquet, write_recipe
from typer.testing import CliRunner

import certipatch as cp
from certipatch import evidence as ev
from certipatch.cli import app
from certipatch.data import load
from certipatch.data.known import known_classes
from certipatch.defenses.settings import ViewSettings
from certipatch.errors import InputError
from certipatch.models import NETWORKS
from certipatch.plumbing import resources
from certipatch.reproduce import TABLES, ReproductionContext, find_study, measures, smoothing
from certipatch.reproduce.context import Outcomes
from certipatch.saved import Card, read_card
from certipatch.saved.card import write
from certipatch.saved.weights import save_weights
from certipatch.training.recipe import read
from certipatch.training.train import train

pytestmark = pytest.mark.slow

NAMES = ["ds-fig1", "ds-fig3", "ds-fig5", "ds-fig6", "ds-table1", "ds-table2", "ds-several"]
STUDIES = TABLES["ds-table1"].studies
FIVE, SIZE = cp.PatchThreat(5), (20, 20)


def untrained(folder, views, network, defense="derandomized-smoothing", size=SIZE, **settings):
    """A model with fresh weights in a folder."""
    card = Card(
        name=folder.name,
        defense=defense,
        settings=settings,
        views=views,
        model=NETWORKS[network](**({} if network == "resnet18" else {"widths": (8, 8)})),
        image_size=size,
        channels=1,
        classes=tuple("0123456789"),
        sha256="",
    )
    torch.manual_seed(0)
    write(folder, card.model_copy(update={"sha256": save_weights(folder, card.network(), "float32")}))
    return folder


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Few thresholds, and only models and data that a test names."""
    monkeypatch.delenv("CERTIPATCH_DATA", raising=False)
    monkeypatch.setattr("certipatch.reproduce.context.resources", SimpleNamespace(find=lambda *_: None))
    monkeypatch.setattr(smoothing, "THETAS", (0.0, 0.3, 0.6, None))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data that call themselves mnist, two trained column networks, and untrained ones of every other kind."""
    folder = tmp_path_factory.mktemp("smoothing")
    data = write_parquet(folder / "mnist", SIZE)
    roles = {}
    for width in (2, 3):
        recipe = write_recipe(folder / f"s{width}.yaml", views={"name": "columns", "width": width}, epochs=12)
        train(read(recipe, [f"data={data}"]), folder / f"s{width}")
        roles[f"columns-s{width}"] = folder / f"s{width}"
    roles["rows-s1"] = untrained(folder / "rows", {"name": "rows", "width": 1}, "strip")
    roles["blocks-s4"] = untrained(folder / "blocks", {"name": "blocks", "width": 4}, "strip")
    pixels = {"name": "random-pixels", "keep": 5}
    few = {"samples": 30, "samples_to_pick": 10}
    roles["pixels-k5"] = untrained(folder / "pixels", pixels, "conv", "randomized-ablation", **few)
    return SimpleNamespace(folder=folder, data=data, roles=roles)


def run(*arguments):
    return CliRunner().invoke(app, ["reproduce", *(str(argument) for argument in arguments)])


def table(world, name, out, *more):
    models = [part for role, folder in world.roles.items() for part in ("--model", f"{role}={folder}")]
    done = run(name, "--data", world.data, "--out", out, *models, *more, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def row(found, label, source="ours"):
    return next(row["cells"] for row in found["rows"] if row["label"] == label and row["source"] == source)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.mark.parametrize("name", NAMES)
def test_every_table_comes_out_with_what_is_there(world, out, name):
    found = table(world, name, out)
    cells = [cell for row in found["rows"] if row["source"] == "ours" for cell in row["cells"]]
    assert any("not_run" in cell for cell in cells)
    assert any("share" in cell or "value" in cell for cell in cells)
    assert {cell["n"] for cell in cells if "share" in cell} <= {20}
    assert any(row["source"] == "paper" for row in found["rows"]) == (name not in ("ds-several", "ds-fig3", "ds-fig6"))
    assert any(note.startswith("not run: certipatch train ") for note in found["notes"])
    assert "(MNIST)" in found["title"]
    if name.startswith("ds-fig"):
        figure = out / "figure.png"
        assert figure.stat().st_size > 10_000
        figure.unlink()


def test_numbers_are_those_of_the_defenses_on_the_right_half(world, out):
    pictures = load(str(world.data))
    images, targets = pictures.images(range(40)), torch.from_numpy(pictures.labels)
    expected = {}
    for width in (2, 3):
        network = cp.load(str(world.roles[f"columns-s{width}"])).model
        views = cp.views.Columns(width)
        for method, defense in (
            ("θ", cp.DerandomizedSmoothing(network, views, threshold=0.3)),
            ("top-1", cp.DerandomizedSmoothing(network, views, threshold=None)),
            ("paper", cp.DerandomizedSmoothing(network, views, threshold=0.3, margin="paper")),
            ("drawn", cp.RandomizedAblation(network, views)),
        ):
            found = defense.certify(images, FIVE)
            expected[width, method] = (found.label == targets) & found.certified
        assert expected[width, "θ"].any()
    made = table(world, "ds-table2", out)
    for width in (2, 3):
        cells = row(made, f"s = {width}, validation half")
        shares = [float(expected[width, method][:20].double().mean()) for method in ("θ", "top-1", "drawn")]
        assert [cell["share"] for cell in cells] == shares
    for label, methods in (
        ("best s, test half", ("θ", "top-1", "drawn")),
        ("best s by the paper's margin, test half", ("paper",)),
    ):
        for cell, method in zip(row(made, label), methods, strict=False):
            best = max((2, 3), key=lambda width: int(expected[width, method][:20].sum()))
            assert cell["at"] == f"s = {best}"
            assert cell["share"] == float(expected[best, method][20:].double().mean())


def test_figure_6_is_evaluate_for_every_patch(world, out, tmp_path):
    made = table(world, "ds-fig6", out)
    arguments = ["evaluate", "--defense", world.roles["columns-s2"], "--data", world.data, "--limit", 20, "--patch", 2]
    done = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "run"), "--json"])
    by_patch = json.loads(done.stdout)["certified_by_patch"]
    for column, cell in zip(made["columns"], row(made, "columns, s = 2"), strict=True):
        assert cell["share"] == by_patch[column.split("x")[0]]


def test_figure_5_holds_the_numbers_of_every_threshold(world, out):
    made = table(world, "ds-fig5", out)
    pictures = load(str(world.data))
    images, targets = pictures.images(range(20)), torch.from_numpy(pictures.labels[:20])
    network = cp.load(str(world.roles["columns-s3"])).model
    cells = dict(zip(made["columns"], row(made, "columns, s = 3"), strict=True))
    for threshold, column in ((0.0, "θ = 0.0"), (0.6, "θ = 0.6"), (None, "top-1")):
        found = cp.DerandomizedSmoothing(network, cp.views.Columns(3), threshold=threshold).certify(images, FIVE)
        assert cells[column]["share"] == float(((found.label == targets) & found.certified).double().mean())
    assert cells["θ = 0.0"]["share"] == 0  # every view votes for every class


def test_figure_3_counts_single_views(world, out):
    made = table(world, "ds-fig3", out)
    pixels, delta, accuracy = (cell["value"] for cell in row(made, "columns, s = 3"))
    assert (pixels, delta) == (3 * 28, (5 + 3 - 1) / 28)
    pictures = load(str(world.data))
    defense = cp.load(str(world.roles["columns-s3"]))
    found = ev.logits(defense.model, defense.views, pictures.images(range(20))).argmax(2)
    right = (found == torch.from_numpy(pictures.labels[:20])[:, None]).double().mean()
    assert accuracy == pytest.approx(100 * float(right))
    assert row(made, "blocks, s = 4")[1]["value"] == (5 + 4 - 1) ** 2 / 28**2
    assert 0 <= row(made, "pixels, k = 5")[2]["value"] <= 100


def outcomes(first, second):
    """Ten pictures, all right; of each half so many certified."""
    certified = torch.tensor([i < first for i in range(5)] + [i < second for i in range(5)])
    return Outcomes(torch.ones(10, dtype=torch.bool), certified)


def test_parameters_are_chosen_on_the_validation_half_alone(world, tmp_path, monkeypatch):
    found = {"a": outcomes(3, 5), "b": outcomes(4, 1), "c": outcomes(4, 2)}
    assert smoothing.choose(found) == "b"  # c ties; a is better on the other half and overall
    clean, certified = smoothing.reported(found["b"], "b")
    assert (certified.count, certified.n, certified.at, clean.count) == (1, 5, "b", 5)
    assert smoothing.choose({}) is None
    with pytest.raises(InputError, match="halved"):
        measures.halves(1)

    by_role = {"columns-s2": outcomes(1, 5), "columns-s3": outcomes(2, 0)}
    monkeypatch.setattr(ReproductionContext, "outcomes", lambda self, slot, *_, **__: by_role[slot.role])
    models = {role: str(world.roles[role]) for role in by_role}
    context = ReproductionContext(tmp_path, str(world.data), models=models)
    two = smoothing.methods(TABLES["ds-table2"].plan("mnist", context))
    best = next(row for row in two.rows if row.label == "best s, test half")
    assert [(cell.count, cell.n, cell.at) for cell in best.cells] == [(0, 5, "s = 3")] * 3
    one = smoothing.best_of_each_method(TABLES["ds-table1"].plan("mnist", context))
    ours = next(row for row in one.rows if row.label == "MNIST 5x5, ours, margin per location")
    assert (ours.cells[0].count, ours.cells[0].at) == (0, "columns, s = 3, θ = 0.0")


def test_missing_models_say_what_they_take(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        done = run(name, "--data", world.data, "--out", tmp_path / name, "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        cells = [cell for row in found["rows"] if row["source"] == "ours" for cell in row["cells"]]
        assert any("not run, about" in cell.get("not_run", "") for cell in cells if isinstance(cell, dict))
        assert not any("share" in cell for cell in cells)
    assert "not run, about 0.7 h of training (mnist-columns-s3)" in (tmp_path / "ds-table2" / "table.md").read_text(
        "utf-8"
    )


def test_several_bands_per_view(tmp_path):
    data = write_parquet(tmp_path / "mnist")
    views = {"name": "columns", "width": 1, "count": 2}
    several = untrained(tmp_path / "several", views, "resnet18", size=(12, 12))
    arguments = ["ds-several", "--data", data, "--limit", 4, "--out", tmp_path / "out", "--json"]
    done = run(*arguments, "--model", f"columns-s1-count2={several}")
    assert done.exit_code == 0, done.output
    assert row(json.loads(done.stdout), "columns, s = 1, 2 per view")[0]["n"] == 2


def test_other_data_and_other_views_are_refused(world, tmp_path):
    other = write_parquet(tmp_path / "stripes")
    for arguments, message in (
        (["ds-table2", "--data", other], "not for stripes"),
        (["ds-table2", "--data", "fashion-sample"], "not for fashion-sample"),
        (["ds-table2", "--data", world.data, "--model", f"columns-s4={world.roles['columns-s2']}"], "stands for"),
        (["ds-table2", "--data", world.data, "--model", "columns-s99=x"], "its roles are"),
        (
            ["ds-table2", "--data", world.data, "--limit", 1, "--model", f"columns-s2={world.roles['columns-s2']}"],
            "halved",
        ),
    ):
        done = run(*arguments, "--out", tmp_path / "out")
        assert isinstance(done.exception, InputError), done.output
        assert message in str(done.exception)
        assert "\n" not in str(done.exception)


def test_a_study_is_found_by_name_or_by_classes_and_size():
    def pictures(name, classes, size):
        return SimpleNamespace(name=name, class_names=classes, pixels=lambda _: np.zeros((1, *size, 1), np.uint8))

    digits, animals = tuple("0123456789"), known_classes("cifar10")
    assert find_study(pictures("ylecun/mnist", (), (1, 1)), STUDIES) == "mnist"
    assert find_study(pictures("digits", digits, (28, 28)), STUDIES) == "mnist"
    assert find_study(pictures("photos", animals, (32, 32)), STUDIES) == "cifar10"
    for name, classes, size in (
        ("digits", digits, (32, 32)),
        ("clothes", animals, (28, 28)),
        ("fashion-mnist", digits, (28, 28)),
    ):
        with pytest.raises(InputError, match="made for mnist or cifar10, not for"):
            find_study(pictures(name, classes, size), TABLES["ds-table2"].studies)


def test_every_command_that_a_table_names_is_a_recipe_for_its_model():
    roles = set()
    for study in STUDIES.values():
        for ablation in study.ablations:
            program, command, recipe, *changes = shlex.split(ablation.command)
            assert (program, command) == ("certipatch", "train")
            asked = read(resources.find("recipes", f"{recipe}.yaml"), [part for part in changes if part != "--set"])
            assert asked.views.values() == ablation.views, ablation.command
            assert asked.name == ablation.name
            assert (study.data, ablation.role) not in roles
            roles.add((study.data, ablation.role))


def test_shipped_models_are_what_the_studies_call_them():
    for study in STUDIES.values():
        for ablation in study.ablations:
            if folder := resources.find("zoo", ablation.name):
                assert read_card(folder).views == ViewSettings(**ablation.views)
