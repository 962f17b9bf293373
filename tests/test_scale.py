"""Several processes: the same summary, byte for byte, with 1, 2 and 3 of them, with one killed, with others afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Command, Forks
from safetensors.torch import load_file
from support import RECIPE, write_parquet, write_recipe

from certipatch.data import Pictures
from certipatch.errors import InputError
from certipatch.plumbing.distributed import Workers
from certipatch.report import of_run
from certipatch.runs import records, run
from certipatch.runs.evaluate import evaluate_into
from certipatch.runs.experiment import DataRef
from certipatch.saved import DefenseRef
from certipatch.threats import PatchThreat
from certipatch.training import read, train
from certipatch.training.train import share_of_batch

pytestmark = pytest.mark.slow

PARTS = 10  # of four pictures


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    train(read(write_recipe(folder / "r.yaml", data=str(folder / "stripes"), epochs=4)), folder / "model")
    return folder


def command(home: Path, out: Path, *more: str) -> list[str]:
    options = {"--defense": home / "model", "--data": home / "stripes", "--patch": 2, "--part": 4, "--out": out}
    return ["evaluate", *(str(value) for option in options.items() for value in option), *more]


@pytest.fixture(scope="module")
def whole(home: Path, forks: Forks) -> Path:
    """The run of one process."""
    assert forks.one(*command(home, home / "whole")).code == 0
    return home / "whole"


def same(one: Path, other: Path) -> None:
    """The same summary to the byte, and the same records."""
    assert (one / "summary.json").read_bytes() == (other / "summary.json").read_bytes()
    assert records.read_records(one).equals(records.read_records(other))
    assert sorted(p.name for p in one.rglob("*")) == sorted(p.name for p in other.rglob("*"))


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_the_summary_of_one(home, whole, forks, tmp_path, count):
    ended = forks.run(*[Command(command(home, tmp_path / "run"))] * count, workers=True)
    assert [process.code for process in ended] == [0] * count
    same(tmp_path / "run", whole)
    assert "certified" in ended[0].out
    shown = [line for line in ended[0].err.splitlines() if line]
    assert all(line.startswith("evaluate: ") for line in shown), "something else than progress"
    assert shown[-1].startswith("evaluate: 40/40"), "progress of the whole run"
    for process in ended[1:]:
        assert process.out == process.err == ""
    assert json.loads((tmp_path / "run" / "timing.json").read_text())["workers"] == count


SLOW = {  # so that every worker gets some parts
    "certipatch.runs.evaluate.write_part": "lambda *part: (__import__('time').sleep(0.1), "
    "__import__('certipatch.runs.records').runs.records.write_part(*part))"
}


def test_one_of_three_is_killed_and_two_others_go_on(home, whole, forks, tmp_path):
    arguments = command(home, tmp_path / "run")
    workers = [Command(arguments, folder=str(tmp_path), kill_at=at, change=SLOW) for at in (None, 6, None)]
    ended = forks.run(*workers, workers=True)
    assert ended[1].code == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "records").glob("*.parquet")}
    assert 0 < len(kept) < PARTS
    assert not (tmp_path / "run" / "summary.json").exists()
    ended = forks.run(*[Command(command(home, tmp_path / "run"))] * 2, workers=True)
    assert [process.code for process in ended] == [0, 0]
    same(tmp_path / "run", whole)
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items()), "finished parts are kept"


def test_the_first_makes_the_parts_of_one_that_is_gone(home, whole, tmp_path, monkeypatch):
    """Where nobody ends the other processes: the lost worker drew tickets and never wrote its parts."""
    monkeypatch.setattr(run, "PATIENCE", 0.0)
    monkeypatch.setattr(Workers, "tickets", lambda self, number: iter(range(0, number, 3)))
    monkeypatch.setattr(run, "PART", 4)
    shown = []
    evaluate_into(
        tmp_path / "run",
        DefenseRef(str(home / "model")),
        DataRef(str(home / "stripes")),
        PatchThreat(2),
        lambda *a: shown.append(a),
        report=of_run,
    )
    assert shown[-1][0] == 40
    same(tmp_path / "run", whole)


def test_an_error_is_told_once_and_ends_all(home, whole, forks, tmp_path):
    bad = {
        "no threat": [
            "evaluate",
            "--defense",
            "fashion-columns",
            "--data",
            "fashion-sample",
            "--out",
            str(tmp_path / "a"),
        ],
        "unknown": command(home, tmp_path / "b", "--split", "nothing"),
        "another run": command(home, whole, "--limit", "8"),
    }
    for arguments in bad.values():
        ended = forks.run(*[Command(arguments)] * 3, workers=True)
        assert all(process.code in (2, -signal.SIGKILL) for process in ended)
        told = [line for process in ended for line in process.err.splitlines() if line]
        assert len(told) == 1, told
        assert told[0].startswith("certipatch: ")


def test_other_pictures_on_another_host_are_refused(home, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART", 4)
    sha256 = Pictures.sha256
    monkeypatch.setattr(Pictures, "sha256", lambda self, i: sha256(self, i) if i != 6 else "0" * 64)
    arguments = (DefenseRef(str(home / "model")), DataRef(str(home / "stripes")), PatchThreat(2))
    evaluate_into(tmp_path / "run", *arguments)  # the other host's records
    monkeypatch.setattr(Pictures, "sha256", sha256)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match="picture 6 of stripes"):
        evaluate_into(tmp_path / "run", *arguments)


def test_torchrun_restarts_a_killed_worker(home, whole, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    arguments = command(home, tmp_path / "run")
    arguments[arguments.index("--part") + 1] = "1"
    process = subprocess.Popen(
        [sys.executable, *launch, "-m", "certipatch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while not list((tmp_path / "run" / "records").glob("*.parquet")):
            assert process.poll() is None
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if children.exists():
            os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        out, err = process.communicate(timeout=1200)
    finally:
        process.terminate()
    assert process.returncode == 0, err
    assert "certified" in out
    assert (tmp_path / "run" / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


@pytest.mark.parametrize(("pictures", "count"), [(16, 1), (16, 3), (5, 2), (2, 3), (1, 4), (7, 7)])
def test_shares_of_a_batch_have_its_mean(pictures, count):
    loss = torch.rand(pictures, dtype=torch.float64)
    shares = [share_of_batch(pictures, rank, count) for rank in range(count)]
    assert all(len(loss[chunk]) > 0 for chunk, _ in shares), "no process is left without a picture"
    means = torch.stack([weight * loss[chunk].mean() for chunk, weight in shares])
    torch.testing.assert_close(means.mean(), loss.mean())


def trained(home: Path, out: Path, epochs: int, *more: str) -> list[str]:
    """81 pictures in batches of 16: the last one has a single picture, which two of three processes do without."""
    changes = (f"epochs={epochs}", "limit=81", "holdout=0", "optimizer=sgd", *more)
    return [
        "train",
        str(home / "r.yaml"),
        "--out",
        str(out),
        *(part for change in changes for part in ("--set", change)),
    ]


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# Statistics of a batch differ between its shares; without them training is a sum over pictures.
NO_STATISTICS = {"torch.nn.functional.batch_norm": "lambda x, m, v, w, b, *_: x * w[:, None, None] + b[:, None, None]"}


@pytest.mark.parametrize("change", [{}, NO_STATISTICS], ids=["BatchNorm", "no statistics"])
def test_training_with_several_processes(home, forks, tmp_path, change):
    assert RECIPE["batch_size"] == 16
    for count in (1, 2, 3):
        out = tmp_path / str(count)
        ended = forks.run(*[Command(trained(home, out, 2), change=change)] * count, workers=count > 1)
        assert [process.code for process in ended] == [0] * count, ended
        assert all(process.out == process.err == "" for process in ended[1:])
        assert json.loads((out / "card.json").read_text())["training"]["processes"] == count
        for line, other in zip(logged(tmp_path / "1"), logged(out), strict=True):
            assert line.keys() == other.keys()
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-3 if change else 0.3)
        if change:
            one, several = (load_file(tmp_path / name / "weights.safetensors") for name in ("1", str(count)))
            for name in one:
                torch.testing.assert_close(one[name].float(), several[name].float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("strategy", ["all", "random", "sparse", "guided"])
def test_certified_training_with_several_processes(home, forks, tmp_path, strategy):
    bound = {"pixels": 2} if strategy == "sparse" else {"patch": 2}
    interval = {"strategy": strategy, "ramp_start": 0.0, "ramp_end": 0.5, **bound}
    recipe = {"name": "tiny", "data": str(home / "stripes"), "epochs": 2, "batch_size": 16, "learning_rate": 0.05}
    recipe |= {
        "model": {"name": "mlp", "widths": [12]},
        "interval": interval,
        "limit": 81,
        "holdout": 20,
        "optimizer": "sgd",
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    for count in (1, 2):
        out = tmp_path / str(count)
        arguments = ["train", str(tmp_path / "r.yaml"), "--out", str(out)]
        ended = forks.run(*[Command(arguments)] * count, workers=count > 1)
        assert [process.code for process in ended] == [0] * count, ended
        assert json.loads((out / "card.json").read_text())["training"]["processes"] == count
    losses = [[line["loss"] for line in logged(tmp_path / name)] for name in ("1", "2")]
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("1", "2"))
    if strategy == "guided":  # each process draws places for its own share of the batch
        assert losses[1] == pytest.approx(losses[0], rel=0.3)
        return
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=2e-4)


def test_masks_climb_with_several_processes_as_with_one(home, forks, tmp_path):
    """With random changes: what a process learned is known to the one that shows next."""
    recipe = {
        "name": "tiny",
        "data": str(home / "stripes"),
        "defense": "patchcleanser",
        "settings": {"patch": 2, "masks": 3},
        "model": {"name": "conv", "widths": [8, 8]},
        "mask_training": {"strategy": "hill-climbing", "climbing_start": 0.0},
        "augment": {"max_shift": 1, "flip": True, "max_rotation": 10},
        "limit": 81,
        "holdout": 0,
        "epochs": 6,
        "batch_size": 16,
        "optimizer": "sgd",
        "learning_rate": 0.01,
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    weights = {}
    for name, count, climbing_start in (("one", 1, 0), ("two", 2, 0), ("three", 3, 0), ("random", 1, 1)):
        asked = ["--out", str(tmp_path / name), "--set", f"mask_training.climbing_start={climbing_start}"]
        arguments = ["train", str(tmp_path / "r.yaml"), *asked]
        ended = forks.run(*[Command(arguments, change=NO_STATISTICS)] * count, workers=count > 1)
        assert [process.code for process in ended] == [0] * count, ended
        weights[name] = load_file(tmp_path / name / "weights.safetensors")

    def apart(one: str, other: str) -> float:
        return max((value - weights[other][key]).abs().max().item() for key, value in weights[one].items())

    assert apart("one", "two") < 1e-4
    assert apart("one", "three") < 1e-4
    assert apart("one", "random") > 1e-3


def test_training_goes_on_exactly_with_as_many_processes_and_nearly_with_others(home, forks, tmp_path):
    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / "weights.safetensors")

    def start(name: str, count: int, kill_at: int | None = None) -> list[int]:
        asked = trained(home, tmp_path / name, 3, "weight_dtype=float32")
        first = Command(asked, folder=str(tmp_path), kill_at=kill_at)
        return [ended.code for ended in forks.run(first, *[Command(asked)] * (count - 1), workers=count > 1)]

    assert start("whole", 2) == [0, 0]
    for name in ("again", "alone"):
        assert start(name, 2, kill_at=9)[0] == -signal.SIGKILL
        assert (tmp_path / name / "checkpoint.safetensors").exists()
    assert start("again", 2) == [0, 0]
    assert start("alone", 1) == [0]
    for name, value in weights("whole").items():
        assert torch.equal(value, weights("again")[name])
        assert value.isfinite().all()
        assert weights("alone")[name].isfinite().all()
    for name in ("whole", "again", "alone"):
        assert [line["epoch"] for line in logged(tmp_path / name)] == [1, 2, 3]
