"""Faults: kills at random moments and at every file operation, full disks, damaged files, clocks that jump."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forks import Command, Ended, Forks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import write_parquet, write_recipe

from certipatch.errors import InputError
from certipatch.report import of_run
from certipatch.runs import records
from certipatch.runs.evaluate import evaluate_into
from certipatch.runs.experiment import DataRef
from certipatch.saved import DefenseRef
from certipatch.threats import PatchThreat
from certipatch.training import read, train

pytestmark = pytest.mark.slow

KILLS = 20


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    train(read(write_recipe(folder / "r.yaml", data=str(folder / "stripes"), epochs=4)), folder / "model")
    return folder


def command(home: Path, out: Path, part: int = 4, limit: int = 40) -> list[str]:
    options = {"--defense": home / "model", "--data": home / "stripes", "--patch": 2, "--part": part}
    options |= {"--limit": limit, "--out": out}
    return ["evaluate", *(str(value) for option in options.items() for value in option)]


def evaluate(home: Path, out: Path) -> None:
    """The run that ``command`` describes, in this process."""
    data = DataRef(str(home / "stripes"), None, 40)
    evaluate_into(out, DefenseRef(str(home / "model")), data, PatchThreat(2), part=4, report=of_run)


@pytest.fixture(scope="module")
def whole(home: Path, forks: Forks) -> Path:
    """A run that nothing disturbed."""
    assert forks.one(*command(home, home / "whole")).code == 0
    return home / "whole"


def same(one: Path, other: Path) -> None:
    """The same summary to the byte, the same records, nothing left behind."""
    assert (one / "summary.json").read_bytes() == (other / "summary.json").read_bytes()
    assert records.read_records(one).equals(records.read_records(other))
    assert sorted(p.relative_to(one) for p in one.rglob("*")) == sorted(p.relative_to(other) for p in other.rglob("*"))


def told(ended: Ended, words: str) -> None:
    """One line and exit code 2."""
    lines = [line for line in ended.err.splitlines() if not line.startswith(("evaluate: ", "train tiny: "))]
    assert ended.code == 2, ended
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("certipatch: ")
    assert words in lines[0]


# --- killed --------------------------------------------------------------------------------------------------------


def test_killed_at_twenty_random_moments(home, whole, forks, tmp_path):
    seconds = forks.one(*command(home, tmp_path / "measured")).seconds
    moments, killed, rounds = random.Random(0), 0, 0
    while killed < KILLS:
        out, rounds = tmp_path / f"run{rounds}", rounds + 1
        assert rounds < 10 * KILLS
        for _ in range(KILLS):  # the same run, killed again and again until it ends
            ended = forks.one(*command(home, out), kill_after=moments.uniform(0.2, 1) * seconds)
            killed += ended.code == -signal.SIGKILL
            if ended.code == 0 or killed == KILLS:
                seconds = (seconds + ended.seconds) / 2 if ended.code == 0 else seconds  # the pace of a machine changes
                break
        assert forks.one(*command(home, out)).code == 0
        same(out, whole)


def test_killed_at_every_file_operation(home, forks, tmp_path):
    arguments = command(home, tmp_path / "whole", limit=4)
    ended = forks.one(*arguments, folder=str(tmp_path))
    assert ended.code == 0
    assert ended.operations > 15
    outs = [tmp_path / f"run{number}" for number in range(1, ended.operations + 1)]
    asked = [command(home, out, limit=4) for out in outs]
    killed = [Command(arguments, folder=str(tmp_path), kill_at=number) for number, arguments in enumerate(asked, 1)]
    assert {ended.code for ended in forks.run(*killed)} == {-signal.SIGKILL}
    assert {ended.code for ended in forks.run(*map(Command, asked))} == {0}
    for out in outs:
        same(out, tmp_path / "whole")


# --- no room, no permission ----------------------------------------------------------------------------------------


def test_a_disk_that_fills_at_every_file_operation(home, whole, forks, tmp_path):
    arguments = command(home, tmp_path / "run")
    number = forks.one(*command(home, tmp_path / "counted"), folder=str(tmp_path / "counted")).operations
    for operation in (*range(1, 8), *range(8, number, 5), number):
        ended = forks.one(*arguments, folder=str(tmp_path / "run"), full_from=operation)
        if ended.code == 0:
            break
        told(ended, "No space left on device")
        assert not list((tmp_path / "run").rglob("*.part")), "what could not be finished takes no room"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "records").iterdir()}
    assert before
    assert forks.one(*arguments).code == 0
    same(tmp_path / "run", whole)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items()), "nothing was lost"


def test_files_that_the_system_cuts_short(home, whole, forks, tmp_path):
    for largest in (100, 1_000, 3_000):
        told(forks.one(*command(home, tmp_path / "run"), largest_file=largest), "File too large")
    assert forks.one(*command(home, tmp_path / "run")).code == 0
    same(tmp_path / "run", whole)


def test_a_disk_that_is_really_full(home, whole, forks, tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no permission to mount a small disk")
    try:
        told(forks.one(*command(home, mounted / "run")), "No space left on device")
        subprocess.run(["mount", "-o", "remount,size=8m", str(mounted)], check=True, capture_output=True)
        assert forks.one(*command(home, mounted / "run")).code == 0
        same(mounted / "run", whole)
    finally:
        subprocess.run(["umount", str(mounted)], check=True, capture_output=True)


def test_a_folder_that_is_read_only(home, whole, forks):
    outs = home / "locked" / "run", home / "locked" / "model"
    evaluate(home, outs[0])
    (outs[0] / "summary.json").unlink()
    for part in (outs[0] / "records").iterdir():
        part.unlink()
    outs[1].mkdir()
    try:
        for path in (home / "locked", *(home / "locked").rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for arguments in (
            command(home, outs[0]),
            command(home, home / "locked" / "new"),
            ["train", str(home / "r.yaml"), "--out", str(outs[1])],
        ):
            told(forks.one(*arguments, bound_by_modes=True), "Permission denied")
    finally:
        for path in (home / "locked", *(home / "locked").rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    evaluate(home, outs[0])
    same(outs[0], whole)


# --- damaged and foreign records -----------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def change(column: str, value: Callable[[list], list]) -> Callable[[Path, Path], None]:
    """Other values in the right schema, with the file's own digest."""

    def apply(part: Path, other: Path) -> None:
        table = pq.ParquetFile(part).read()
        place = table.schema.get_field_index(column)
        values = pa.array(value(table[column].to_pylist()), table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), values), part)

    return apply


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "missing": lambda part, other: part.unlink(),
    "empty": lambda part, other: part.write_bytes(b""),
    "truncated": lambda part, other: part.write_bytes(part.read_bytes()[:-100]),
    "its first half": lambda part, other: part.write_bytes(part.read_bytes()[: part.stat().st_size // 2]),
    **{f"bit flipped at {p}": (lambda part, other, p=p: flip(part, p)) for p in (0.01, 0.2, 0.3, 0.4, 0.5, 0.7, 0.99)},
    "no parquet": lambda part, other: part.write_text("no parquet"),
    "of another part": lambda part, other: part.write_bytes(part.with_name("part-00000008.parquet").read_bytes()),
    "of another run": lambda part, other: part.write_bytes((other / part.parent.name / part.name).read_bytes()),
    "another schema": lambda part, other: pq.write_table(pa.table({"index": [4, 5, 6, 7]}), part),
    "many rows": lambda part, other: pq.write_table(pa.concat_tables([pq.ParquetFile(part).read()] * 1000), part),
    "index out of range": change("index", lambda old: [4, 5, 6, 10**9]),
    "index twice": change("index", lambda old: [4, 5, 5, 7]),
}
NONSENSE = {
    "all certified": change("certified", lambda old: [not old[0]] * 4),
    "margins": change("margin", lambda old: [float("nan")] * 4),
    "labels": change("label", lambda old: [10**6] * 4),
    "targets": change("target", lambda old: [-1] * 4),
    "text without end": change("sha256", lambda old: ["0" * 10**6] * 4),
}


@pytest.fixture(scope="module")
def other_run(home: Path, forks: Forks) -> Path:
    """The same pictures against another threat."""
    arguments = command(home, home / "other")
    arguments[arguments.index("--patch") + 1] = "3"
    assert forks.one(*arguments).code == 0
    return home / "other"


def same_evidence(one: Path, other: Path) -> bool:
    """Evidence does not depend on the threat: another run's may be ours to the byte."""
    name = Path("evidence") / "part-00000004.parquet"
    return (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("folder", ["records", "evidence"])
@pytest.mark.parametrize("damage", [*DAMAGES, *NONSENSE])
def test_damaged_and_foreign_parts_are_made_again(home, whole, other_run, tmp_path, folder, damage):
    if folder == "evidence" and damage in NONSENSE:
        pytest.skip("evidence has no such column")
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    part = tmp_path / "run" / folder / "part-00000004.parquet"
    (DAMAGES | NONSENSE)[damage](part, other_run)
    config = records.read_config(tmp_path / "run")
    found = records.read_part(tmp_path / "run", config, 4)
    untouched = found is not None and found.equals(records.read_part(whole, config, 4))  # a bit that means nothing
    assert found is None or (untouched and (folder == "records" or same_evidence(tmp_path / "run", whole)))
    assert found is None or "bit" in damage or damage == "of another run", "no part passes that is not this run's"
    assert all(records.read_part(tmp_path / "run", config, first) is not None for first in (0, 8, 36))


def test_a_run_with_many_damages_ends_as_it_should(home, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    parts = sorted((tmp_path / "run" / "records").iterdir())
    flip(parts[0], 0.3)
    DAMAGES["truncated"](parts[1], whole)
    DAMAGES["index twice"](parts[2], whole)
    shutil.copy(parts[4], tmp_path / "run" / "records" / "part-00000040.parquet")  # no picture has this number
    shutil.copy(parts[4], tmp_path / "run" / "records" / "part-99999999.parquet")
    (tmp_path / "run" / "records" / "part-00000012.parquet.0123abcd.part").write_text("left behind")
    (tmp_path / "run" / "summary.json").write_bytes((whole / "summary.json").read_bytes()[:50])
    evaluate(home, tmp_path / "run")
    for number in ("00000040", "99999999"):
        (tmp_path / "run" / "records" / f"part-{number}.parquet").unlink()
    same(tmp_path / "run", whole)


def test_a_damaged_configuration_is_told(home, whole, forks, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for content in ("", "command: [", "- 1", "command: evaluate\nimages: 1000000000000\npart: 1\n"):
        (tmp_path / "run" / "config.yaml").write_text(content)
        told(forks.one(*command(home, tmp_path / "run")), str(tmp_path / "run"))
        with pytest.raises(InputError):
            records.read_records(tmp_path / "run")


def test_a_summary_of_something_else_is_not_believed(home, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    summary = json.loads((whole / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"images": 1, "certified_accuracy": 1.0}))
    evaluate(home, tmp_path / "run")
    same(tmp_path / "run", whole)


# --- clocks --------------------------------------------------------------------------------------------------------


def test_clocks_that_jump(home, whole, tmp_path, monkeypatch):
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
    evaluate(home, tmp_path / "run")
    same(tmp_path / "run", whole)
    assert json.loads((tmp_path / "run" / "timing.json").read_text())["images_per_second"] > 0


# --- checkpoints of a training -------------------------------------------------------------------------------------


def trained(home: Path, out: Path) -> list[str]:
    return ["train", str(home / "r.yaml"), "--out", str(out), "--set", "epochs=2"]


def weights(out: Path) -> bytes:
    return (out / "weights.safetensors").read_bytes()


def epochs(out: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_training_killed_at_every_file_operation(home, forks, tmp_path):
    ended = forks.one(*trained(home, tmp_path / "whole"), folder=str(tmp_path))
    assert ended.code == 0
    outs = [tmp_path / f"model{number}" for number in range(1, ended.operations + 1)]
    asked = [trained(home, out) for out in outs]
    killed = [Command(arguments, folder=str(tmp_path), kill_at=number) for number, arguments in enumerate(asked, 1)]
    assert {ended.code for ended in forks.run(*killed)} == {-signal.SIGKILL}
    assert {ended.code for ended in forks.run(*map(Command, asked))} == {0}
    for out in outs:
        assert weights(out) == weights(tmp_path / "whole")
        assert epochs(out) == [1, 2], "each epoch once"
        assert not (out / "checkpoint.safetensors").exists()


def test_a_training_on_a_full_disk_goes_on_when_there_is_room(home, forks, tmp_path):
    operations = forks.one(*trained(home, tmp_path / "whole"), folder=str(tmp_path)).operations
    for number in range(1, operations + 1, 3):
        ended = forks.one(*trained(home, tmp_path / "model"), folder=str(tmp_path), full_from=number)
        if ended.code == 0:
            break
        told(ended, "No space left on device")
    assert forks.one(*trained(home, tmp_path / "model")).code == 0
    assert weights(tmp_path / "model") == weights(tmp_path / "whole")
    assert epochs(tmp_path / "model") == [1, 2]


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "flipped", "foreign", "of another recipe", "no step", "slots"]
)
def test_a_damaged_checkpoint_is_told(home, forks, tmp_path, damage):
    ended = forks.one(*trained(home, tmp_path / "model"), folder=str(tmp_path), kill_at=8)
    path = tmp_path / "model" / "checkpoint.safetensors"
    assert ended.code == -signal.SIGKILL
    assert path.exists()
    with safe_open(path, framework="pt") as file:
        about, tensors = dict(file.metadata()), load_file(path)
    state = json.loads(about["training"])
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        flip(path, 0.9)
    elif damage == "foreign":
        save_file({"weights": torch.zeros(3)}, path)
    elif damage == "of another recipe":
        save_file(tensors, path, about | {"training": json.dumps(state | {"recipe": "0" * 64})})
    elif damage == "no step":
        save_file(tensors, path, {"training": json.dumps({"recipe": state["recipe"]})})
    else:
        save_file(tensors | {"optimizer.x.momentum": torch.zeros(3)}, path, {"training": about["training"]})
    told(forks.one(*trained(home, tmp_path / "model")), "remove it")
    assert path.exists(), "what the user may want to look at stays"


def test_a_checkpoint_without_a_digest_still_loads(home, forks, tmp_path):
    """As versions before digests wrote them."""
    assert forks.one(*trained(home, tmp_path / "whole")).code == 0
    assert forks.one(*trained(home, tmp_path / "model"), folder=str(tmp_path), kill_at=8).code == -signal.SIGKILL
    path = tmp_path / "model" / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        about = {"training": file.metadata()["training"]}
    save_file(load_file(path), path, about)
    assert json.loads(about["training"])["step"] > 0
    assert forks.one(*trained(home, tmp_path / "model")).code == 0
    assert weights(tmp_path / "model") == weights(tmp_path / "whole")
