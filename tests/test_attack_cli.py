"""certipatch attack: the contract, stopping and resuming, a broken certificate, the campaign, and bad input."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import write_parquet, write_recipe

from certipatch import cli
from certipatch.attacks import find
from certipatch.rules import Verdict, Vote
from certipatch.runs import attack as attack_runs
from certipatch.runs import campaign as campaigns
from certipatch.runs.campaign import COUNTS, Cell, affordable, campaign
from certipatch.runs.records import read_evidence, read_records
from certipatch.saved import load, read_card
from certipatch.threats import PatchThreat
from certipatch.training import read, train

COMMAND = ("attack", "--defense", "model", "--data", "stripes", "--patch", "1", "--attack", "patch-pgd")
BLIND = """
import torch
from torch import nn

class Blind(nn.Module):
    channels = 1

    def forward(self, x):
        values = torch.from_numpy(x.detach().numpy().copy())
        return 30 * nn.functional.adaptive_avg_pool2d(values, (3, 1)).flatten(1)

def network():
    return Blind().eval()
"""
SMALL = ("--limit", "12", "--starts", "2", "--steps", "6", "--step", "0.2", "--part", "5")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    write_recipe(folder / "r.yaml", data=str(folder / "stripes"), epochs=8)
    train(read(folder / "r.yaml"), folder / "model")
    plain = {"views": None, "model": {"name": "mlp", "widths": [16]}, "defense": "undefended", "objective": {}}
    write_recipe(folder / "p.yaml", data=str(folder / "stripes"), epochs=1, **plain)
    train(read(folder / "p.yaml"), folder / "plain")
    return folder


@pytest.fixture
def certipatch(monkeypatch, capsys, home):
    """Run a command in the home folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(home)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["certipatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err  # type: ignore[return-value]

    return run


def refused(answer: tuple[int, str, str]) -> str:
    """The one line of an answer with exit code 2."""
    code, _, err = answer
    lines = [line for line in err.splitlines() if line.startswith("certipatch: ")]
    assert code == 2, answer
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_as_the_contract_says_and_again(certipatch, tmp_path):
    code, out, _ = certipatch(*COMMAND, *SMALL, "--out", tmp_path / "run", "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["attack"], summary["images"], summary["broken_certificates"]) == ("patch-pgd", 12, 0)
    assert summary["clean_accuracy"] >= summary["attacked_accuracy"] >= summary["certified_accuracy"] > 0
    assert summary["certified_pictures_attacked"] >= 12 * summary["certified_accuracy"]
    assert summary["attacked_certified_places"] > 0
    rows = read_records(tmp_path / "run").to_pylist()
    right = [row["label"] == row["target"] for row in rows]
    assert summary["clean_accuracy"] == sum(right) / 12
    standing = [ok and not row["broken"] for ok, row in zip(right, rows, strict=True)]
    assert summary["attacked_accuracy"] == sum(standing) / 12
    assert all(row["attacked"] for row in rows if row["certified"])
    assert all(row["attacked_label"] != row["label"] for row in rows if row["broken"])
    evidence = read_evidence(tmp_path / "run").to_pylist()
    assert [row["index"] for row in evidence] == list(range(12))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "attacked accuracy" in page
    assert "<script" not in page
    before = snapshot(tmp_path / "run")
    assert certipatch(*COMMAND, *SMALL, "--out", tmp_path / "run", "--json")[:2] == (0, out)
    assert snapshot(tmp_path / "run") == before


def test_bf16_is_written_down_and_starts_another_run(certipatch, tmp_path):
    code, _, _ = certipatch(*COMMAND, *SMALL, "--bf16", "--out", tmp_path / "fast")
    assert code == 0
    assert yaml.safe_load((tmp_path / "fast" / "config.yaml").read_text())["attack"]["bf16"] is True
    code, _, err = certipatch(*COMMAND, *SMALL, "--out", tmp_path / "fast")
    assert code == 2
    assert "another" in err
    assert certipatch("report", tmp_path / "fast", "--data", "stripes")[0] == 0


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_summary(certipatch, tmp_path, monkeypatch):
    certipatch(*COMMAND, *SMALL, "--out", tmp_path / "whole")
    write, written = attack_runs.write_part, []

    def interrupted(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(arguments[0])
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(attack_runs, "write_part", interrupted)
        assert certipatch(*COMMAND, *SMALL, "--out", tmp_path / "run")[0] == 130
        assert not (tmp_path / "run" / "summary.json").exists()
    assert certipatch(*COMMAND, *SMALL, "--out", tmp_path / "run")[0] == 0
    for name in ("summary.json", "records/part-00000005.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    line = refused(certipatch(*COMMAND, *SMALL, "--seed", "1", "--out", tmp_path / "run"))
    assert "seed" in line or "another run" in line


def test_a_broken_certificate_is_exit_code_1_and_saved(certipatch, tmp_path, monkeypatch):
    true = Vote.certify

    def false(self, evidence, sees, unsure=None, error=None):
        found = true(self, evidence, sees, unsure, error)
        return Verdict(found.label, found.margin.abs() + 1)

    monkeypatch.setattr(Vote, "certify", false)
    big = [word if word != "1" else "8" for word in COMMAND]
    code, out, _ = certipatch(*big, "--limit", "6", "--starts", "3", "--steps", "20", "--out", tmp_path / "run")
    assert code == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["broken_certificates"] > 0
    assert summary["attacked_accuracy"] < summary["certified_accuracy"]  # nothing is clamped
    assert "broken" in out
    saved = sorted((tmp_path / "run" / "broken").glob("*.safetensors"))
    assert len(saved) == summary["broken_certificates"]
    tensors = load_file(saved[0])
    defense = load("model")
    before, after = (defense.predict(tensors[name][None]) for name in ("picture", "attacked"))
    assert before != after
    changed = (tensors["picture"] != tensors["attacked"]).any(0).nonzero()
    assert (changed.amax(0) - changed.amin(0) < 8).all()
    assert saved[0].with_name(saved[0].stem + "-attacked.png").exists()
    assert "certificate broken" in (tmp_path / "run" / "report.html").read_text()
    assert certipatch(*big, "--limit", "6", "--starts", "3", "--steps", "20", "--out", tmp_path / "run")[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--defense", "lgs", "--model", "plain", "--patch", "3", "--where", "corners"),
        ("--defense", "dw", "--model", "plain", "--patch", "3", "--plain", "--set", "pixel_fraction=0.2"),
        ("--defense", "patchguard", "--model", "model", "--patch", "1", "--set", "threshold=0.5"),
        ("--defense", "patchguard-plus-plus", "--model", "model", "--patch", "1"),
        ("--defense", "patchcleanser", "--model", "plain", "--patch", "2", "--set", "masks=3"),
        ("--defense", "minority-reports", "--model", "plain", "--patch", "2", "--set", "masks=3"),
        ("--defense", "plain", "--attack", "linf", "--epsilon", "8/255"),
        ("--defense", "model", "--attack", "sparse", "--sparse", "2"),
        ("--defense", "model", "--attack", "square", "--patch", "3", "--count", "2"),
        ("--defense", "model", "--attack", "universal", "--patch", "3", "--target", "1"),
    ],
)
def test_every_kind_of_attack_and_defense(certipatch, tmp_path, options):
    more = ("--data", "stripes", "--limit", "6", "--starts", "2", "--steps", "4", "--out", tmp_path / "run", "--json")
    code, out, err = certipatch("attack", *options, *more)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["clean_accuracy"] >= summary["attacked_accuracy"] >= summary["certified_accuracy"]
    if options[1] in ("lgs", "dw", "plain"):
        assert summary["certified_accuracy"] == summary["attacked_certified_places"] == 0
        assert "Nothing is certified" in (tmp_path / "run" / "report.html").read_text()


def test_sampled_answers_that_change_are_no_broken_certificates(certipatch, tmp_path):
    options = (
        "--defense",
        "randomized-ablation",
        "--model",
        "model",
        "--set",
        "samples=30",
        "--set",
        "samples_to_pick=10",
    )
    more = ("--data", "stripes", "--patch", "2", "--limit", "4", "--starts", "1", "--steps", "2", "--json")
    code, out, err = certipatch("attack", *options, *more, "--out", tmp_path / "run")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["broken_certificates"] == 0
    assert summary["changed_sampled_answers"] >= 0
    assert summary["confidence"] < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--attack", "patch-pdg"), "did you mean 'patch-pgd'"),
        (("--attack", "sparse"), "give --sparse K"),
        (("--attack", "linf"), "--epsilon"),
        (("--epsilon", "0.1"), "give it alone"),
        (("--target", "3"), "give 0 to 2"),
        (("--search", "nowhere"), "use one of"),
        (("--patch", "13"), "does not fit"),
        (("--all-zoo",), "leave --defense"),
        (("--data", "nonsense"), "nonsense"),
    ],
)
def test_bad_input_is_one_line(certipatch, tmp_path, changes, words):
    assert words in refused(certipatch(*COMMAND, *SMALL, *changes, "--out", tmp_path / "run"))


def test_a_network_without_gradients_is_told_what_fits_and_falls_to_it(certipatch, tmp_path, home, monkeypatch):
    (home / "blind_classifier.py").write_text(BLIND)
    monkeypatch.syspath_prepend(str(home))
    command = ("attack", "--defense", "undefended", "--model", "blind_classifier:network", "--data", "stripes")
    few = ("--patch", 9, "--limit", 6, "--starts", 2, "--steps", 60)
    for name in ("patch-pgd", "lavan", "universal"):
        line = refused(certipatch(*command, *few, "--attack", name, "--out", tmp_path / name))
        assert "no gradient" in line
        assert "square" in line
    code, out, err = certipatch(*command, *few, "--attack", "square", "--out", tmp_path / "run", "--json")
    sys.modules.pop("blind_classifier")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["attacked_accuracy"] < summary["clean_accuracy"] == 1


def test_threats_that_a_defense_was_not_built_for(certipatch, tmp_path):
    more = ("--data", "stripes", "--limit", "6", "--starts", "2", "--steps", "4", "--json")
    fixed = ("--defense", "patchguard", "--model", "model", "--set", "patch=1", "--set", "ignore_threat=true",
             "--patch", "6")  # fmt: skip
    masks = (
        "--defense",
        "patchcleanser",
        "--model",
        "plain",
        "--set",
        "masks=3",
        "--sparse",
        "2",
        "--attack",
        "sparse",
    )
    for number, options in enumerate((fixed, masks)):
        code, out, err = certipatch("attack", *options, *more, "--out", tmp_path / str(number))
        assert code == 0, err
        summary = json.loads(out)
        assert summary["broken_certificates"] == 0
        assert summary["clean_accuracy"] >= summary["attacked_accuracy"] >= summary["certified_accuracy"]
    uncovered = (
        "--defense",
        "patchcleanser",
        "--model",
        "plain",
        "--patch",
        "3",
        "--set",
        "masks=1",
        "--set",
        "stride=2",
    )
    assert "does not cover" in refused(certipatch("attack", *uncovered, *more[:-1], "--out", tmp_path / "run"))


def test_empirical_defenses_are_attacked_not_evaluated(certipatch, tmp_path):
    command = (
        "evaluate",
        "--defense",
        "lgs",
        "--model",
        "plain",
        "--data",
        "stripes",
        "--patch",
        "2",
        "--out",
        tmp_path,
    )
    assert "certifies nothing; attack it" in refused(certipatch(*command))
    assert "give --defense and --data" in refused(certipatch("attack", "--out", tmp_path / "run"))
    code, out, _ = certipatch("list", "attacks", "--json")
    assert code == 0
    assert list(json.loads(out)["attacks"]) == ["patch-pgd", "lavan", "universal", "square", "sparse", "linf"]


@pytest.mark.slow
def test_a_campaign_stops_resumes_and_reports(certipatch, tmp_path, home, monkeypatch):
    card = read_card(home / "model")
    monkeypatch.setattr(campaigns, "zoo", lambda: {"model": card})
    command = ("attack", "--all-zoo", "--minutes", "0.01", "--out", tmp_path / "run")
    code, out, _ = certipatch(*command)
    assert code == 0
    lines = out.strip().splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:-1]] == [
        "patch-pgd",
        "lavan",
        "universal",
        "square",
        "sparse",
    ]
    table = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert table["broken_certificates"] == 0
    assert table["certified_pairs"] == sum(row["certified_pairs"] for row in table["rows"])
    before = snapshot(tmp_path / "run")
    assert certipatch(*command)[:2] == (0, out)
    assert snapshot(tmp_path / "run") == before
    assert "another campaign" in refused(certipatch(*command, "--seed", "3"))
    longer = (*command[:3], str(table["minutes"] + 0.05), *command[4:])
    assert certipatch(*longer)[0] == 0
    more = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert more["minutes"] > table["minutes"]
    rounds = [(old["rounds"], new["rounds"]) for old, new in zip(table["rows"], more["rows"], strict=True)]
    assert all(old <= new for old, new in rounds)
    assert any(old < new for old, new in rounds)


@pytest.mark.parametrize(
    ("starts", "steps", "units", "expected"),
    [(8, 40, 1e9, (8, 40)), (64, 2, 1e9, (64, 2)), (8, 40, 40.0, (8, 5)), (64, 2, 40.0, (20, 2)), (8, 40, 5.0, (2, 2)),
     (2, 20, 0.0, (1, 2)), (2, 1, 0.0, (1, 1))],
)  # fmt: skip
def test_slow_defenses_get_fewer_starts_and_steps_in_a_round(starts, steps, units, expected):
    assert affordable(starts, steps, units) == expected


def test_a_round_of_another_attack_asks_for_no_second_certificate(home, tmp_path, monkeypatch):
    from certipatch.data import load as pictures

    data, defense, asked = pictures(str(home / "stripes"), "test"), load(str(home / "model")), []
    true = type(defense).certify
    monkeypatch.setattr(type(defense), "certify", lambda self, *given: asked.append(given) or true(self, *given))
    cells = [
        Cell("model", find(name), PatchThreat(6), lambda: (defense, data)) for name in ("patch-pgd", "lavan", "square")
    ]
    rows = campaign(cells, tmp_path / "run", 0.0, 0, lambda done, total, text: None)
    assert len(asked) == 1
    assert all(row["pictures"] > 0 for row in rows)


@pytest.mark.slow
def test_campaign_cells_count_certified_pairs_and_find_a_liar(home, tmp_path, monkeypatch):
    from certipatch.data import load as pictures

    data, defense = pictures(str(home / "stripes"), "test"), load(str(home / "model"))
    cells = [Cell("model", find(name), PatchThreat(6), lambda: (defense, data)) for name in ("patch-pgd", "square")]
    honest = campaign(cells, tmp_path / "honest", 0.0, 0, lambda done, total, text: None)
    assert all(row["rounds"] == 1 for row in honest)
    assert all(row["broken_certificates"] == 0 for row in honest)
    again = campaign(cells, tmp_path / "honest", 0.0, 0, lambda done, total, text: None)
    assert [row[key] for row in again for key in COUNTS] == [row[key] for row in honest for key in COUNTS]
    true = Vote.certify
    monkeypatch.setattr(
        Vote, "certify", lambda self, *given: Verdict((v := true(self, *given)).label, torch.ones_like(v.margin))
    )
    liar = campaign(cells, tmp_path / "liar", 3.0, 0, lambda done, total, text: None)
    assert sum(row["broken_certificates"] for row in liar) > 0
    assert list((tmp_path / "liar" / "broken").glob("*.safetensors"))
