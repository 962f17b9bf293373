"""Tables of papers: the analysis against literal references, and whole tables from tiny models."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_parquet, write_recipe
from typer.testing import CliRunner

from certipatch import reproduce
from certipatch.cli import app
from certipatch.errors import InputError
from certipatch.models import SmallBagNet, receptive_fields
from certipatch.reproduce import masking
from certipatch.reproduce.table import NotRun, Number, Row, Share, Table
from certipatch.rules import RobustMask, Windows
from certipatch.training.recipe import read
from certipatch.training.train import train


def test_masked_predictions_are_sums_without_a_window():
    logits = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    found = masking.masked_predictions(logits, (4, 5), 2)
    windows = Windows.boxes((4, 5), (2, 2)).members
    expected = torch.stack([logits.double()[:, ~window].sum(1).argmax(1) for window in windows], 1)
    assert torch.equal(found, expected)
    assert torch.equal(masking.masked_predictions(logits, (4, 5), 0)[:, 0], logits.double().sum(1).argmax(1))
    with pytest.raises(ValueError, match="does not fit"):
        masking.masked_predictions(logits, (4, 5), 5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    st.sampled_from([1.0, 3.0, torch.inf]),
    st.integers(1, 3),
)
def test_a_picture_without_a_cause_of_failure_is_a_certified_one(seed, threshold, clip, width):
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.rand(6, 9, 3, generator=generator, dtype=torch.float64) - 0.5) ** 3
    scores[..., 0] += 0.4
    rule = RobustMask(Windows.runs(9, width), threshold, clip)
    sees = Windows.runs(9, 2).members
    verdict = rule.certify(scores, sees)
    cause = masking.failure_cause(scores, verdict.label, sees, rule)
    assert torch.equal(cause == -1, verdict.certified)


def test_causes_of_failure_by_hand():
    sees = torch.tensor([[True, False, False, False]])
    rule = RobustMask(Windows.runs(4, 1), 0.0)

    def cause(own, rival, rule=rule):
        scores = torch.tensor([own, rival], dtype=torch.float64).T[None]
        return masking.CAUSES[masking.failure_cause(scores, torch.tensor([0]), sees, rule)]

    assert cause([9, 1, 1, 1], [0, 2, 2, 0]) == "exact"
    assert cause([9, 2, 0, 0], [0, 1, 0, 0]) == "benign window"
    assert cause([9, 2, 0, 0], [0, 1, 0, 0], RobustMask(Windows.runs(4, 1), 1.0, 3.0)) == "rival unmasked"
    wide = torch.tensor([[True, True, False, False]])
    assert cause([9, 2, 1, 0], [0, 0, 1.5, 0], RobustMask(wide)) == "overlapping window"


def test_false_positives_of_detection():
    scores = torch.zeros(2, 4, 2)
    scores[0, :, 0], scores[1, 0, 0] = 1.0, 1.0
    rule = RobustMask(Windows.runs(4, 1), 0.5)
    assert masking.windows_masked(scores, rule).tolist() == [False, True]
    assert not masking.windows_masked(scores, RobustMask(Windows.runs(4, 1), 1.0)).any()


def test_a_cell_looks_most_at_the_centre():
    assert masking.looks(2).tolist() == [1, 2, 3, 2, 1]
    assert masking.looks(3).tolist() == [1, 3, 6, 7, 6, 3, 1]
    network = SmallBagNet(1, 3, (12, 12), 10, (2, 3, 4, 5)).eval()
    found = masking.attention(network, [torch.rand(2, 1, 12, 12)], 14)
    shown = receptive_fields(network, (12, 12)).visible((12, 12))[14]
    assert (found[~shown] == 0).all()
    assert found[shown].max() > 0


def test_a_table_in_markdown_csv_and_json():
    table = Table(["a|b", "c"], [Row("x", [Share(1, 4), Number(2.5, " ms")]), Row("y", [NotRun("not run")], "paper")])
    assert "| x | ours | 25.0 ±32.7 | 2.5 ms |" in table.markdown()
    assert "a\\|b" in table.markdown()
    assert table.csv().splitlines()[2] == "y,paper,not run,"
    assert table.to_json()["rows"][0]["cells"][0]["share"] == 0.25


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A data folder, a small BagNet, a column and a plain network, trained for an epoch."""
    folder = tmp_path_factory.mktemp("reproduce")
    data = write_parquet(folder / "data")
    bagnet = write_recipe(
        folder / "bagnet.yaml",
        name="bagnet",
        defense="patchguard",
        settings={"score_type": "confidence", "patch": 2},
        views=None,
        model={"name": "small-bagnet", "receptive_field": 10, "widths": [4, 4, 8, 8]},
        objective={"views_per_step": "all", "cross_entropy_weight": 1.0, "mask_margin_weight": 1.0, "patch": 2},
        epochs=1,
    )
    columns = write_recipe(folder / "columns.yaml", epochs=1)
    mlp = {"name": "mlp", "widths": [8]}
    plain = write_recipe(folder / "plain.yaml", epochs=1, defense="undefended", views=None, model=mlp, objective={})
    for name, path in (("bagnet", bagnet), ("columns", columns), ("plain", plain)):
        train(read(path, [f"data={data}"]), folder / name)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pg-table5", *(f"pg-table{n}" for n in range(14, 21)), "pg-fig7"])
def test_every_table_is_made_from_tiny_models(models, tmp_path, name):
    arguments = ["reproduce", name, "--data", models / "data", "--out", tmp_path / "out"]
    for role in ("bagnet", "columns", "plain"):
        arguments += ["--model", f"{role}={models / role}"]
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    table = json.loads(done.stdout)
    ours = [row for row in table["rows"] if row["source"] == "ours"]
    assert ours
    assert any("paper" in row["source"] for row in table["rows"])
    for row in ours:
        for cell in row["cells"]:
            if "share" in cell:
                assert 0 <= cell["share"] <= 1
                assert cell["n"] == 40
    assert any("share" in cell or "value" in cell for row in ours for cell in row["cells"])
    written = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| paper |" in written
    if name == "pg-fig7":
        assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    if name == "pg-table17":
        for row in ours:  # clean = certified + every cause
            clean, certified, _, *causes = (round(40 * cell["share"]) for cell in row["cells"])
            assert clean == certified + sum(causes)


@pytest.mark.slow
def test_a_table_agrees_with_evaluate_and_is_not_made_twice(models, tmp_path, monkeypatch):
    arguments = ["--data", models / "data", "--out", tmp_path / "table", "--model", f"columns={models / 'columns'}"]
    table = json.loads(run("reproduce", "pg-table19", *arguments, "--json").stdout)
    evaluated = json.loads(
        run(
            "evaluate", "--defense", "patchguard", "--model", models / "columns", "--data", models / "data",
            "--patch", 5, "--out", tmp_path / "run", "--json",
        ).stdout
    )  # fmt: skip
    confidence = table["rows"][1]["cells"]
    assert confidence[2]["share"] == evaluated["clean_accuracy"]
    assert confidence[3]["share"] == evaluated["certified_accuracy"]

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(reproduce.ReproductionContext, "logits", refuse)
    assert json.loads(run("reproduce", "pg-table19", *arguments, "--json").stdout) == table


def test_missing_models_say_what_they_take(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("reproduce", "pg-table9", "--data", models / "data", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "h of training (imagenette-bagnet17)" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pg-table55"], "did you mean"),
        (["pg-table5", "--model", "bagnet"], "ROLE=NAME"),
        (["pg-table5", "--model", "columnz=x"], "its roles are"),
        (["pg-table5", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    done = run("reproduce", *arguments, "--out", tmp_path / "out")
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)


def test_list():
    done = run("reproduce", "list", "--json")
    assert set(json.loads(done.stdout)) == set(reproduce.TABLES)
