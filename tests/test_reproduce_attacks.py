"""Tables of attacks from tiny models: every cell is an attack run that is gone on with, and can be looked at."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from support import write_parquet, write_recipe
from typer.testing import CliRunner

from certipatch import inference
from certipatch import reproduce as tables
from certipatch.cli import app
from certipatch.errors import InputError
from certipatch.models import MLPSettings
from certipatch.report import rebuild
from certipatch.reproduce import ReproductionContext, attacked, rows
from certipatch.reproduce.schema import ModelSlot
from certipatch.runs.records import read_records
from certipatch.saved import Card
from certipatch.saved.card import write
from certipatch.saved.weights import save_weights
from certipatch.threats import PatchThreat
from certipatch.training.recipe import read
from certipatch.training.train import train

pytestmark = pytest.mark.slow

FEW = ("--limit", 6, "--starts", 2, "--steps", 3)


@pytest.fixture(autouse=True)
def little(monkeypatch, tmp_path):
    """Only the models and data that a test names, and one ε."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CERTIPATCH_DATA", raising=False)
    monkeypatch.setattr("certipatch.reproduce.context.resources", SimpleNamespace(find=lambda *_: None))
    figure = tables.TABLES["ds-fig7"]
    (key, rows_) = ("attacked-mnist", figure.spec.rows_of("attacked-mnist"))
    fewer = {key: tuple(row for row in rows_ if row.epsilon in ("", "0.3"))}
    spec = figure.spec.model_copy(update={"rows": fewer})
    monkeypatch.setitem(tables.TABLES, "ds-fig7", replace(figure, spec=spec))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data that call themselves mnist, a plain network and one of columns, trained a little, and interval bounds."""
    folder = tmp_path_factory.mktemp("attacks")
    data = write_parquet(folder / "mnist")
    plain = {"views": None, "model": {"name": "mlp", "widths": [16]}, "defense": "undefended", "objective": {}}
    for name, epochs, changes in (("plain", 4, plain), ("columns", 8, {})):
        recipe = write_recipe(folder / f"{name}.yaml", epochs=epochs, **changes)
        train(read(recipe, [f"data={data}"]), folder / name)
    card = Card(
        name="bounds",
        defense="interval-bounds",
        settings={},
        views=None,
        model=MLPSettings(widths=(8,)),
        image_size=(12, 12),
        channels=1,
        classes=tuple("0123456789"),
        sha256="",
    )
    torch.manual_seed(0)
    write(
        folder / "bounds",
        card.model_copy(update={"sha256": save_weights(folder / "bounds", card.network(), "float32")}),
    )
    return SimpleNamespace(folder=folder, data=data)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def table(world, name, out, **models):
    roles = [part for role, model in models.items() for part in ("--model", f"{role}={world.folder / model}")]
    done = run("reproduce", name, "--data", world.data, "--out", out, *FEW, *roles, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def row(found, label, source="ours"):
    return next(row["cells"] for row in found["rows"] if row["label"] == label and row["source"] == source)


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_figure_7_is_attack_for_every_size_and_is_not_run_twice(world, out):
    found = table(world, "ds-fig7", out, plain="plain", columns="columns")
    assert [row["label"] for row in found["rows"]] == [
        "no attack", *(f"{side}x{side} patch" for side in (1, 3, 5, 8)), "L∞, ε = 0.3",
    ]  # fmt: skip
    clean = row(found, "no attack")
    assert {cell["n"] for cell in clean[:2]} == {6}
    for side in (1, 3, 5, 8):
        plain, columns, certified = row(found, f"{side}x{side} patch")
        assert clean[1]["share"] >= columns["share"] >= certified["share"]
        assert clean[0]["share"] >= plain["share"]
    assert row(found, "1x1 patch")[2]["share"] > 0
    assert row(found, "8x8 patch")[0]["share"] < clean[0]["share"]
    assert row(found, "L∞, ε = 0.3")[2] == "-"
    assert all((out / f"figure-{panel}.png").stat().st_size > 10_000 for panel in "ab")
    assert any("2 starts x 3 steps of 0.05" in note for note in found["notes"])
    before = files(out / "attacks")
    assert table(world, "ds-fig7", out, plain="plain", columns="columns") == found
    assert files(out / "attacks") == before
    again = run("attack", "--defense", world.folder / "columns", "--data", world.data, "--patch", 3, *FEW, "--json",
                "--out", out / "own")  # fmt: skip
    summary = json.loads(again.stdout)
    assert row(found, "3x3 patch")[1]["share"] == summary["attacked_accuracy"]
    assert row(found, "3x3 patch")[2]["share"] == summary["certified_accuracy"]


def test_table_1_tells_what_a_defense_loses_to_being_known(world, out):
    found = table(world, "ibp-table1", out, plain="plain")
    for label in ("MNIST 2x2, LGS", "MNIST 5x5, LGS", "MNIST 5x5, DW"):
        clean, plain, adaptive, lost = row(found, label)
        assert lost["value"] == pytest.approx(100 * (plain["share"] - adaptive["share"]))
        assert clean["share"] >= max(plain["share"], adaptive["share"])
    assert row(found, "MNIST 5x5, none")[2:] == ["the same", "-"]
    assert row(found, "CIFAR-10 5x5, LGS") == [{"not_run": "not run (--data cifar10)"}]
    assert row(found, "ImageNet 60x60, DW") == [{"not_run": "not run (--data imagenette)"}]
    assert row(found, "ImageNet 60x60, DW", "paper") == ["-", "45", "5"]
    assert row(found, "CIFAR-10 5x5, DW", "paper") == ["45.3", "59.3", "15.6"]
    assert row(found, "MNIST 5x5, none", "paper") == ["98.5", "3.3", "the same"]
    configs = [yaml.safe_load(path.read_text()) for path in (out / "attacks").glob("lgs-plain-*/config.yaml")]
    assert sorted(config["attack"]["adaptive"] for config in configs) == [False, False, True, True]


def test_table_2_puts_attacks_beside_certificates(world, out):
    found = table(world, "ibp-table2-attacked", out, plain="plain", columns="columns", **{"ibp-5": "bounds"})
    clean, standing, certified = row(found, "MNIST 5x5, IFGSM, mnist-columns")
    assert clean["share"] >= standing["share"] >= certified["share"]
    assert row(found, "MNIST 2x2, IFGSM, mnist-columns")[2]["share"] > 0
    assert row(found, "MNIST 5x5, IFGSM, none")[2] == "-"
    assert row(found, "MNIST 5x5, IFGSM + LGS, LGS")[2] == "-"
    clean, standing, certified = row(found, "MNIST 5x5, IFGSM, IBP")
    assert clean["share"] >= standing["share"] >= certified["share"]
    assert row(found, "MNIST 5x5, IFGSM, IBP", "paper") == ["92.9", "66.1", "62.0"]
    (missing,) = row(found, "MNIST 2x2, IFGSM, IBP")
    assert missing["not_run"] == "not run, about 0.4 h of training (mnist-ibp-2)"
    assert "not run: certipatch train mnist-ibp-2" in found["notes"]
    assert not any("mnist-ibp-5" in note for note in found["notes"])


def test_without_models_every_cell_says_what_it_takes(world, tmp_path):
    for name in ("ds-fig7", "ibp-table2-attacked"):
        found = table(world, name, tmp_path)
        cells = [cell for row in found["rows"] if row["source"] == "ours" for cell in row["cells"] if cell]
        assert all("not run, about" in cell["not_run"] for cell in cells)
        assert "not run: certipatch train mnist-plain" in found["notes"]
    assert not (tmp_path / "attacks").exists()


def test_a_run_of_a_table_has_a_page(world, out):
    table(world, "ds-fig7", out, plain="plain", columns="columns")
    table(world, "ibp-table1", out, plain="plain")
    runs = {}
    for folder in (out / "attacks").iterdir():
        config = yaml.safe_load((folder / "config.yaml").read_text())
        runs[config["method"], config["threat"]["kind"]] = folder
    methods = ("undefended", "derandomized-smoothing")
    assert runs.keys() >= {
        ("lgs", "patch"),
        ("dw", "patch"),
        *((name, kind) for name in methods for kind in ("patch", "linf")),
    }
    for folder in runs.values():
        text = rebuild(folder).read_text()
        assert "attacked accuracy" in text
        assert "<script" not in text


def test_the_page_of_an_attack_comes_from_its_records(world, tmp_path):
    command = ("attack", "--defense", world.folder / "columns", "--data", world.data, "--patch", 2, *FEW)
    assert run(*command, "--out", tmp_path / "run").exit_code == 0
    made = (tmp_path / "run" / "report.html").read_text()
    values = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(values | {"attacked_accuracy": 0.999}))
    assert run("report", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "report.html").read_text() == made
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for damaged, reason in (
        (config | {"attack": 3}, "damaged settings"),
        (config | {"attack": config["attack"] | {"name": "nonsense"}}, "unknown attack"),
        (config | {"attack": config["attack"] | {"defense": "x"}}, "damaged settings"),
        (config | {"attack": {"name": "square", "starts": 1, "steps": 1, "extra": 1}}, "damaged settings"),
        (
            config | {"attack": config["attack"] | {"adaptive": False}, "classes": []},
            "classes in config.yaml does not follow",
        ),
        (
            config | {"attack": {"name": "square", "starts": 1, "steps": 1}},
            "attack in config.yaml does not follow from the model",
        ),
        (config | {"threat": {"kind": "linf"}}, "damaged settings"),
        (config | {"model_sha256": "0" * 64}, "is not the model of"),
    ):
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(damaged))
        with pytest.raises(InputError, match=reason):
            rebuild(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match="run the same certipatch attack command again"):
        rebuild(tmp_path / "run")


def test_attacked_pictures_are_those_that_the_defense_was_shown(world, tmp_path):
    context = ReproductionContext(
        tmp_path, str(world.data), limit=8, models={"plain": str(world.folder / "plain")}, starts=3, steps=5
    )
    found = attacked.outcome(
        context, ModelSlot(role="plain", name="plain"), PatchThreat(4), attacked.Strength(step=0.3)
    )
    assert isinstance(found, attacked.AttackResult)
    clean, changed = found.images(range(8))
    records = read_records(found.folder)
    assert found.target.defense.predict(changed).tolist() == records["attacked_label"].to_pylist()
    assert found.clean.count - found.attacked.count == sum(records["broken"].to_pylist()) > 0
    pixels = (clean != changed).any(1).flatten(1).sum(1)
    assert (pixels[torch.tensor(records["attacked"].to_pylist())] > 0).all()
    assert pixels.max() <= 16


def test_a_run_that_stopped_goes_on(world, tmp_path, monkeypatch):
    models = {"plain": str(world.folder / "plain")}
    context = ReproductionContext(tmp_path, str(world.data), limit=12, models=models, starts=2, steps=2)
    plain, strength = ModelSlot(role="plain", name="plain"), attacked.Strength()
    monkeypatch.setattr(inference, "PIXELS", 20 * 12 * 12)  # parts of 5 pictures
    whole = attacked.outcome(context, plain, PatchThreat(2), strength)
    assert isinstance(whole, attacked.AttackResult)
    parts = sorted((whole.folder / "records").glob("part-*.parquet"))
    assert len(parts) == 3
    kept = parts[0].read_bytes()
    summary = (whole.folder / "summary.json").read_bytes()
    for gone in (*parts[1:], whole.folder / "summary.json", whole.folder / "timing.json"):
        gone.unlink()
    assert attacked.outcome(context, plain, PatchThreat(2), strength).attacked == whole.attacked  # type: ignore[union-attr]
    assert (whole.folder / "summary.json").read_bytes() == summary
    assert parts[0].read_bytes() == kept
    shutil.rmtree(whole.folder)


def test_a_broken_certificate_fails_the_table(world, tmp_path, monkeypatch):
    made = attacked.run_attack
    monkeypatch.setattr(attacked, "run_attack", lambda *arguments: made(*arguments) | {"broken_certificates": 2})
    done = run("reproduce", "ds-fig7", "--data", world.data, "--out", tmp_path, "--limit", 2, "--starts", 1, "--steps", 1,
               "--model", f"columns={world.folder / 'columns'}")  # fmt: skip
    assert done.exit_code == 1
    assert "2 certificates of columns broke: " in done.output
    assert (tmp_path / "table.md").exists()


def test_photographs_need_a_package_and_say_which(world, tmp_path, monkeypatch):
    def absent(name):
        raise InputError(f"{name} needs the package x: pip install certipatch[photos]")

    monkeypatch.setattr(attacked, "open_model", absent)
    context = ReproductionContext(tmp_path, str(world.data), limit=2)
    plan = tables.TABLES["ibp-table1"].plan("attacked-imagenette", context)
    row = next(row for row in plan.rows if row.label == "ImageNet 42x42, LGS")
    cells = rows.fill_row(plan, row)[0].cells
    assert [str(cell) for cell in cells] == [
        "not run (imagenet-lite needs the package x: pip install certipatch[photos])"
    ]
    assert rows.train_commands(context, plan.slots) == []


def test_more_options_that_do_not_fit_are_refused(world, tmp_path):
    assert run("reproduce", "ds-fig7", "--data", world.data, "--out", tmp_path, "--starts", 0).exit_code == 2
    done = run("reproduce", "ds-fig7", "--data", world.data, "--out", tmp_path, "--model", "nonsense=x")
    assert isinstance(done.exception, InputError)
    assert "its roles are plain, columns" in str(done.exception)
    done = run("reproduce", "ds-fig6", "--data", world.data, "--out", tmp_path, "--steps", 3)
    assert "attacks nothing" in str(done.exception)
    for data, reason in (
        (write_parquet(tmp_path / "mnist", (12, 10)), "12x10"),
        (write_parquet(tmp_path / "c" / "mnist", colour=True), "of 3"),
    ):
        done = run(
            "reproduce", "ds-fig7", "--data", data, "--out", tmp_path, "--model", f"plain={world.folder / 'plain'}"
        )
        assert "plain reads 12x12 pixels of 1 channels, mnist has" in str(done.exception)
        assert reason in str(done.exception)


def test_tables_that_attack_are_known():
    assert {"ds-fig7", "ibp-table1", "pg-table2", "pg-fig3"} <= tables.ATTACKING <= set(tables.TABLES)
    assert "ibp-table2" not in tables.ATTACKING
