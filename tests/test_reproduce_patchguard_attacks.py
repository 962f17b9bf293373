"""PatchGuard's tables and figure about attacks, from tiny models: right numbers, honest gaps, nothing computed twice."""

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import write_parquet, write_recipe
from typer.testing import CliRunner

import certipatch as cp
from certipatch.attacks import PatchPGD, Task, Victim
from certipatch.cli import app
from certipatch.data import load
from certipatch.defenses import Undefended
from certipatch.errors import InputError
from certipatch.models import ConvNet, receptive_fields
from certipatch.plumbing import resources
from certipatch.reproduce import TABLES, ReproductionContext, local_histograms, local_logits, plots
from certipatch.reproduce.aggregation import MEAN, aggregations, undefended
from certipatch.reproduce.attacked import target
from certipatch.reproduce.schema import read_paper
from certipatch.reproduce.table import Mean
from certipatch.rules import ClippedSum, Median, TrimmedMean
from certipatch.training.recipe import read
from certipatch.training.train import train

pytestmark = pytest.mark.slow

NAMES = ["pg-table2", "pg-table4", "pg-table6", "pg-table21", "pg-fig3"]
N, SIZE = 6, (12, 12)


def conv(size=SIZE, widths=(4, 8)):
    """A conv network with fresh weights and batch norms that do something."""
    torch.manual_seed(1)
    network = ConvNet(None, 1, 3, size, widths)
    network(torch.rand(20, 1, *size))  # moves the statistics
    return network.eval()


def test_local_logits_are_the_last_layer_on_every_cell():
    network, images = conv(), torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    local = local_logits.LocalConv(network)
    features = network.body(images)
    found = local(images)
    assert found.shape == (2, 9, 3)
    for cell in range(9):
        expected = network.head(features[:, :, cell // 3, cell % 3])
        assert torch.allclose(found[:, cell], expected, atol=1e-5)
        assert torch.equal(local_logits.Cell(local, cell)(images), found[:, cell])
    assert torch.equal(local_logits.MeanOfCells(local)(images), found.mean(1))
    one = conv((4, 4), (4, 4))  # a map of one cell: its local logits are the answer
    one.temperature = 0.5
    small = torch.rand(3, 1, 4, 4)
    assert torch.allclose(local_logits.LocalConv(one)(small)[:, 0], one(small), atol=1e-6)


def test_a_cell_depends_on_its_receptive_field_alone():
    local = local_logits.LocalConv(conv((24, 24), (4, 8)))
    fields = receptive_fields(local, (24, 24))
    images = torch.rand(1, 1, 24, 24, requires_grad=True)
    found = local(images)
    assert found.shape[1] == fields.number((24, 24)) == 36
    seen = fields.visible((24, 24))
    assert not seen.all()
    for cell in (0, 7, 35):
        (gradient,) = torch.autograd.grad(found[0, cell].sum(), images, retain_graph=True)
        assert (gradient[0, 0][~seen[cell]] == 0).all()


def test_ways_to_add_up_are_their_rules():
    local, images = local_logits.LocalConv(conv()), torch.rand(4, 1, *SIZE)
    logits, ways = local(images), aggregations(local, None, cp.PatchThreat(3), SIZE)
    clipped = torch.tanh(0.05 * logits - 1).double().sum(1).argmax(1)
    assert torch.equal(ways["tanh(0.05u − 1)"].predict(images), clipped)
    for words, rule in (
        ("mean", MEAN),
        ("clipped to (0, 15)", ClippedSum(0, 15)),
        ("median", Median()),
        ("mean of the middle half", TrimmedMean(2)),
    ):
        assert torch.equal(ways[words].predict(images), rule.predict(logits))
    assert torch.equal(ways["mean"].predict(images), logits.mean(1).argmax(1))


def test_no_attack_on_a_patient_network_ends_early():
    network, images = conv(), torch.rand(3, 1, *SIZE)
    label = Undefended(network).predict(images)
    task = Task(images, label, cp.PatchThreat(8), [0, 1, 2], starts=1, steps=5, step=0.2, search="random")
    found = PatchPGD().run(Victim(local_histograms.AlwaysAlarming(network)), task)
    assert not found.broken.any()
    assert found.queries == 3 * (5 + 1)
    ended = PatchPGD().run(Victim(Undefended(network)), task)
    assert (found.loss >= ended.loss - 1e-5).all()  # one that ends at the first success has no larger lead


def test_a_mean_with_its_interval():
    found = Mean.of(np.array([0.0, 0.5, 1.0]))
    assert (found.percent, found.n) == (50, 3)
    assert found.half == pytest.approx(100 * 1.96 * 0.5 / 3**0.5)
    assert str(found) == "50.0 ±56.6"
    assert found.to_json()["ci95"] == pytest.approx((-0.0658, 1.0658), abs=1e-4)
    assert Mean.of(np.ones(1)).half == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data that call themselves mnist, a plain network, a BagNet and an MLP, trained for an epoch or two."""
    folder = tmp_path_factory.mktemp("attacked")
    data = write_parquet(folder / "mnist")
    plain = {"views": None, "defense": "undefended", "objective": {}}
    bagnet = {
        "defense": "patchguard",
        "settings": {"score_type": "logits", "patch": 2},
        "views": None,
        "model": {"name": "small-bagnet", "receptive_field": 10, "widths": [4, 4, 8, 8]},
        "objective": {"views_per_step": "all"},
    }
    for name, changes in (
        ("plain", plain | {"model": {"name": "conv", "widths": [8, 8]}, "epochs": 3}),
        ("bagnet", bagnet | {"epochs": 1}),
        ("mlp", plain | {"model": {"name": "mlp", "widths": [8]}, "epochs": 1}),
    ):
        train(read(write_recipe(folder / f"{name}.yaml", name=name, **changes), [f"data={data}"]), folder / name)
    return SimpleNamespace(folder=folder, data=data)


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch):
    """Only models that a test names."""
    monkeypatch.setattr("certipatch.reproduce.context.resources", SimpleNamespace(find=lambda *_: None))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


def run(*arguments):
    return CliRunner().invoke(app, ["reproduce", *(str(argument) for argument in arguments)])


def table(world, name, out):
    models = [part for role in ("plain", "bagnet") for part in ("--model", f"{role}={world.folder / role}")]
    few = ["--limit", N, "--starts", 2, "--steps", 6]
    done = run(name, "--data", world.data, "--out", out, *models, *few, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def ours(found):
    return {row["label"]: row["cells"] for row in found["rows"] if row["source"] == "ours"}


@pytest.mark.parametrize("name", NAMES)
def test_every_table_comes_out_with_n_attack_and_paper(world, out, name):
    found = table(world, name, out)
    cells = [cell for cells in ours(found).values() for cell in cells if isinstance(cell, dict)]
    assert {cell["n"] for cell in cells if "n" in cell} == {N}
    assert all(0 <= cell["share"] <= 1 for cell in cells if "share" in cell)
    notes = "\n".join(found["notes"])
    assert f"{N} pictures of mnist test" in notes
    assert "1 start x 6 steps" in notes
    assert "(MNIST)" in found["title"]
    if name == "pg-fig3":  # which has no numbers in the paper
        assert (out / "figure.png").stat().st_size > 10_000
    else:  # they are of other data
        assert "the paper, ImageNette, ResNet-50" in notes


def test_attacks_never_help_and_certificates_hold(world, out):
    for label, cells in ours(table(world, "pg-table21", out)).items():
        clean, *attacked, certified = cells
        bound = 0 if certified == "-" else certified["share"]
        assert all(clean["share"] >= one["share"] >= bound for one in attacked), label
    found = ours(table(world, "pg-table4", out))
    assert len(found) == 6  # two networks, three attacks
    for two_clean, two, five_clean, five in found.values():
        assert two_clean["share"] == five_clean["share"] >= max(two["share"], five["share"])
    by_field = table(world, "pg-table6", out)
    for label, cells in ours(by_field).items():  # the same runs
        assert cells == [found[label][0], found[label][1], found[label][3]]
    assert "bagnet: 36 cells, receptive field 10x10" in by_field["notes"]


def test_table_2_counts_cells_one_by_one(world, out):
    (cells,) = ours(table(world, "pg-table2", out)).values()
    pictures = load(str(world.data))
    network = local_logits.LocalConv(cp.load(str(world.folder / "plain")).model)
    targets = torch.from_numpy(pictures.labels[:N])
    wrong = network(pictures.images(range(N))).argmax(2) != targets[:, None]
    attacked, before, difference, whole = cells
    assert before["mean"] == pytest.approx(float(wrong.double().mean()))
    assert attacked["mean"] - before["mean"] == pytest.approx(difference["mean"])
    assert difference["mean"] >= 0
    clean = cp.load(str(world.folder / "plain")).predict(pictures.images(range(N))) != targets
    assert whole["share"] >= float(clean.double().mean())


def test_nothing_is_attacked_twice_and_damage_is_mended(world, out, monkeypatch):
    first = {name: table(world, name, out) for name in ("pg-table4", "pg-fig3")}
    with monkeypatch.context() as patched:
        patched.setattr(PatchPGD, "run", lambda *_: pytest.fail("attacked again"))
        for name, found in first.items():
            assert table(world, name, out) == found
    part = next((out / "maxima").rglob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    assert table(world, "pg-fig3", out) == first["pg-fig3"]


def test_missing_models_and_what_trains_them(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        done = run(name, "--data", world.data, "--out", tmp_path / name, "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert all("not run, about" in cells[0]["not_run"] for cells in ours(found).values())
        assert "not run: certipatch train mnist-plain" in found["notes"]
    for study in TABLES["pg-table4"].studies.values():
        for slot in study.models:
            _, _, recipe, *changes = shlex.split(slot.command)
            path = resources.find("recipes", f"{recipe}.yaml")
            asked = read(path, [part for part in changes if part != "--set"])
            assert (asked.name, asked.data) == (slot.name, study.data)


def test_networks_without_a_map_are_refused_by_name(world, tmp_path):
    few = ["--limit", 2, "--steps", 1, "--out", tmp_path]
    done = run("pg-table2", "--data", world.data, "--model", f"plain={world.folder / 'mlp'}", *few)
    assert isinstance(done.exception, InputError)
    assert "a MLP has no local logits" in str(done.exception)
    context = ReproductionContext(tmp_path, str(world.data), limit=2, models={"plain": str(world.folder / "mlp")})
    slot = read_paper("patchguard").studies["attacked-mnist"].model("plain")
    found = undefended(target(context, slot, None))  # table IV takes it
    assert isinstance(found.defense, Undefended)


@pytest.mark.parametrize("name", ["pg-table4", "pg-fig3"])
def test_pictures_that_a_network_does_not_read_are_refused(world, tmp_path, name):
    other = write_parquet(tmp_path / "mnist", colour=True)
    done = run(name, "--data", other, "--model", f"plain={world.folder / 'plain'}", "--out", tmp_path / "out")
    assert isinstance(done.exception, InputError)
    assert "plain reads 12x12 pixels of 1 channels, mnist has 12x12 of 3" in str(done.exception)


def test_histograms_of_nothing_say_so():
    values = np.array([0.0, 1.0, 1.0, 5.0])
    full = plots.histograms(
        [("one", [("clean", values, "#0072B2"), ("attacked", values + 1, "#D55E00")])], ("x", "y"), 8
    )
    empty = plots.histograms([], ("x", "y"), 8)
    assert full.startswith(b"\x89PNG")
    assert empty.startswith(b"\x89PNG")
    assert len(full) > len(empty)
