"""Run folders: kill -9 anywhere gives the same summary; other configurations and broken files are handled."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import norm
from support import write_parquet, write_recipe

from certipatch.comparison.runs import read_run
from certipatch.errors import InputError
from certipatch.plumbing.files import read_config, sha256
from certipatch.report import of_run, rebuild
from certipatch.runs import records, run
from certipatch.runs.evaluate import evaluate_into
from certipatch.runs.experiment import DataRef
from certipatch.runs.metrics import wilson
from certipatch.runs.records import read_evidence, read_records, stored_evidence
from certipatch.saved import DefenseRef
from certipatch.threats import PatchThreat, SparseThreat
from certipatch.training import read, train


def quiet(done: int, total: int, text: str) -> None:
    """No progress bar."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    train(read(write_recipe(folder / "r.yaml", data=str(folder / "stripes"), epochs=3)), folder / "model")
    return folder


def evaluate(home: Path, out: Path, threat=None, **options):
    threat = threat or PatchThreat(2)
    limit = options.pop("limit", None)
    return evaluate_into(
        out,
        DefenseRef(str(home / "model")),
        DataRef(str(home / "stripes"), "test", limit),
        threat,
        quiet,
        report=of_run,
    )


def test_the_summary_counts_all_pictures(home, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART", 7)
    summary = evaluate(home, tmp_path / "run")
    records = read_records(tmp_path / "run").to_pylist()
    assert len(records) == summary["images"] == 40
    assert [record["index"] for record in records] == list(range(40))
    right = [record["label"] == record["target"] for record in records]
    robust = [r and record["certified"] for r, record in zip(right, records, strict=True)]
    assert summary["clean_accuracy"] == sum(right) / 40
    assert summary["certified_accuracy"] == sum(robust) / 40 == summary["certified_by_patch"]["2"]
    assert list(summary["certified_ci95"]) == list(wilson(sum(robust), 40))
    by_patch = list(summary["certified_by_patch"].values())
    assert by_patch == sorted(by_patch, reverse=True)
    for record in records:
        assert record["certified"] == (record["margin"] > 0)
        assert 0 <= record["weakest_top"] <= 10
        assert (record["weakest_height"], record["weakest_width"]) == (2, 2)
    needed = {
        "defense",
        "model_sha256",
        "dataset",
        "split",
        "images",
        "threat",
        "notion",
        "theorem",
        "seed",
        "versions",
    }
    assert needed <= summary.keys()
    timing = json.loads((tmp_path / "run" / "timing.json").read_text())
    assert timing["forward_passes_per_image"] == 1
    assert timing["multiply_adds_per_image"] > 0
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


def test_stored_evidence_gives_the_same_certificates(home, tmp_path):
    evaluate(home, tmp_path / "run")
    records = read_records(tmp_path / "run")
    from certipatch import saved

    defense = saved.load(str(home / "model"))
    stored = stored_evidence(read_evidence(tmp_path / "run"), 12, 3, (12, 12))
    found = defense.certificate(stored, PatchThreat(2))
    assert found.label.tolist() == records["label"].to_pylist()
    assert found.margin.amin(1).tolist() == records["margin"].to_pylist()


@pytest.mark.slow
def test_killed_while_it_runs_it_resumes_to_the_same_bytes(home, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART", 3)
    whole = evaluate(home, tmp_path / "whole")
    script = (
        "import sys, time; from certipatch.runs import evaluate, run; run.PART = 3; write = evaluate.write_part\n"
        "def slow(*part): time.sleep(0.1); write(*part)\n"
        "evaluate.write_part = slow\n"
        "from certipatch.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "evaluate", "--defense", str(home / "model")]
    command += ["--data", str(home / "stripes"), "--split", "test", "--patch", "2", "--out", str(tmp_path / "killed")]
    killed = 0
    for parts in (1, 3, 6, 10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "killed" / "records").glob("part-*.parquet"))) >= parts:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    for name in ("summary.json", "config.yaml"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "killed" / "summary.json").read_text()) == json.loads(json.dumps(whole))


def test_a_finished_run_is_left_alone(home, tmp_path):
    first = evaluate(home, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert json.loads(json.dumps(first)) == json.loads(json.dumps(evaluate(home, tmp_path / "run")))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_another_configuration_is_refused(home, tmp_path):
    evaluate(home, tmp_path / "run")
    for threat, limit in ((PatchThreat(3), None), (PatchThreat(2), 5)):
        with pytest.raises(InputError, match="another run"):
            evaluate(home, tmp_path / "run", threat, limit=limit)


def test_a_folder_of_something_else_is_refused_and_kept(home, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="no run folder"):
        evaluate(home, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_corrupt_part_is_made_again(home, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART", 10)
    evaluate(home, tmp_path / "run")
    good = (tmp_path / "run" / "summary.json").read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    part = sorted((tmp_path / "run" / "records").glob("part-*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:100])
    evaluate(home, tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_bytes() == good
    assert len(pq.read_table(part)) == 10


def test_a_sparse_threat_has_no_place(home, tmp_path):
    evaluate(home, tmp_path / "run", SparseThreat(1), limit=5)
    assert read_records(tmp_path / "run")["weakest_top"].to_pylist() == [None] * 5


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (523, 1000), (1, 3)])
def test_wilson_is_its_formula(successes, n):
    z = norm.ppf(0.975)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    assert wilson(successes, n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def rewrite(out: Path, change, digest: bool) -> None:
    """Change the records of every part of a run; with ``digest`` as a forger would, who writes the digests anew."""
    config = read_config(out)
    for first in range(0, config["images"], config["part"]):
        path = records.part_path(out, "records", first)
        old = pq.read_table(path)
        new, about = change(old.replace_schema_metadata(None)), old.schema.metadata
        if digest:
            about = {"digest": records._digest(config, new, sha256(records.part_path(out, "evidence", first)))}
        pq.write_table(new.replace_schema_metadata(about), path)


def put(name: str, value):
    def change(table):
        column = pa.array([value(row) for row in table.to_pylist()], table.schema.field(name).type)
        return table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)

    return change


FORGERIES = {
    "certified": put("certified", lambda row: True),
    "label": put("label", lambda row: row["target"]),
    "target": put("target", lambda row: row["label"]),
    "margin": put("margin", lambda row: row["margin"] + 1),
    "no alarm": put("alarm", lambda row: True),
    "order": lambda table: table.take(list(range(len(table)))[::-1]),
}


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    evaluate(home, out)
    return out


@pytest.mark.parametrize("digest", [False, True], ids=["found by digests", "found by counting again"])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_changed_record_is_found_by_every_command(home, finished, tmp_path, name, digest):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    evaluate(home, out)  # nothing was changed yet
    before = (out / "report.html").read_bytes()
    assert rebuild(out, str(home / "stripes"), str(home / "model")).read_bytes() == before
    rewrite(out, FORGERIES[name], digest)
    refused = r"changed after they were written|does not give|not the label|in order|lacks records"
    with pytest.raises(InputError, match=refused):
        evaluate(home, out)
    with pytest.raises(InputError, match=refused):
        rebuild(out, str(home / "stripes"), str(home / "model"))
    if not digest:
        with pytest.raises(InputError, match=r"changed after they were written"):
            read_run(out)


@pytest.mark.parametrize("key", ["certified_accuracy", "clean_accuracy", "certified_ci95", "certified_by_patch"])
def test_a_changed_summary_is_not_repeated(home, finished, tmp_path, key):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    summary = json.loads((out / "summary.json").read_text())
    summary[key] = (
        {**summary[key], "2": 0.99} if isinstance(summary[key], dict) else [0.9, 1.0] if "ci" in key else 0.95
    )
    (out / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match=f"summary.json says {key}"):
        evaluate(home, out)
    again = rebuild(out, str(home / "stripes"), str(home / "model"))  # counts the records
    assert again.read_bytes() == (finished / "report.html").read_bytes()
