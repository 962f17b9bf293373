"""The command line: what section 4 of the design promises, and one line with exit code 2 for every bad input."""

import errno
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import png, stripes, write_parquet, write_recipe

import certipatch as cp
from certipatch import cli
from certipatch.training import read, train


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    write_recipe(folder / "r.yaml", data=str(folder / "stripes"), epochs=4)
    train(read(folder / "r.yaml"), folder / "model")
    (folder / "good.png").write_bytes(stripes(2, 5)[1][0])
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
    code, out, err = answer
    lines = [line for line in err.splitlines() if line.startswith("certipatch: ")]
    assert code == 2, answer
    assert out == ""
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_certify_json_is_one_object_as_in_the_contract(certipatch, home):
    code, out, err = certipatch("certify", "good.png", "--defense", "model", "--patch", "2", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer.keys() == {"defense", "threat", "results"}
    (result,) = answer["results"]
    assert result.keys() == {"image", "label", "name", "certified", "margin", "largest_patch", "weakest"}
    pixels = torch.from_numpy(np.array(Image.open(home / "good.png")))[None, None].float() / 255
    found = cp.load(str(home / "model")).certify(pixels, cp.PatchThreat(2))
    assert result["label"] == int(found.label[0]) == 1
    assert result["certified"] == bool(found.certified[0])
    assert result["margin"] == found.margin.amin().item()
    assert (result["largest_patch"] >= 2) == result["certified"]
    assert result["weakest"].keys() == {"top", "left", "height", "width"}


def test_certify_writes_a_report(certipatch, tmp_path):
    code, out, _ = certipatch(
        "certify", "good.png", "good.png", "--defense", "model", "--patch", "3x2", "--out", tmp_path / "run"
    )
    assert code == 0
    assert out.count("good.png") == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.yaml", "summary.json", "report.html"}
    assert "good.png" in (tmp_path / "run" / "report.html").read_text()


def test_evaluate_then_again(certipatch, tmp_path):
    command = (
        "evaluate",
        "--defense",
        "model",
        "--data",
        "stripes",
        "--patch",
        "2%",
        "--out",
        tmp_path / "run",
        "--json",
    )
    code, out, _ = certipatch(*command)
    assert code == 0
    summary = json.loads(out)
    assert summary["images"] == 40
    assert certipatch(*command)[:2] == (0, out)


@pytest.mark.parametrize(
    "threat",
    [
        ("--patch", "2", "--count", "2"),
        ("--patch", "4", "--shape", "diamond"),
        ("--patch", "2", "--where", "corners"),
        ("--patch", "2", "--where", "0,0;5,7"),
        ("--sparse", "2"),
    ],
)
def test_every_kind_of_threat(certipatch, tmp_path, threat):
    command = ("evaluate", "--defense", "model", "--data", "stripes", "--limit", "6", "--out", tmp_path / "run")
    code, out, _ = certipatch(*command, *threat)
    assert code == 0
    assert "certified" in out


@pytest.mark.slow
def test_train_from_the_command_line_and_a_folder_of_class_folders(certipatch, tmp_path):
    for split, seed in (("train", 1), ("test", 2)):
        for number, (encoded, target) in enumerate(stripes(40, seed, (16, 12), colour=True)):
            path = tmp_path / "photos" / split / f"class-{target}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    command = ("train", "r.yaml", "--data", tmp_path / "photos", "--out", tmp_path / "m", "--set", "epochs=8")
    code, out, _ = certipatch(*command, "--set", "holdout=4")
    assert code == 0, out
    command = ("evaluate", "--defense", tmp_path / "m", "--data", tmp_path / "photos", "--patch", "2", "--json")
    code, out, _ = certipatch(*command, "--out", tmp_path / "run")
    assert code == 0
    assert json.loads(out)["dataset"] == "photos"
    assert json.loads(out)["clean_accuracy"] > 0.6


def test_lists(certipatch):
    for kind in ("defenses", "models", "datasets", "recipes"):
        code, out, _ = certipatch("list", kind, "--json")
        assert code == 0
        assert json.loads(out)[kind]
    assert "derandomized-smoothing" in certipatch("list")[1]


def test_one_thing_in_full(certipatch):
    code, out, _ = certipatch("list", "defenses", "patchcleanser")
    assert code == 0
    assert "Double masking" in out
    assert "    --set patch=5\n" in out
    assert json.loads(certipatch("list", "defenses", "dw", "--json")[1])["settings"]["neighbour_fraction"] == 0.4
    assert "epochs: " in certipatch("list", "recipes", "mnist-columns")[1]
    assert "Gradient" in certipatch("list", "attacks", "patch-pgd")[1]
    assert "certified" in certipatch("list", "models", "mnist-ibp-5")[1]
    code, _, err = certipatch("list", "defenses", "patchclenser")
    assert code == 2
    assert "did you mean 'patchcleanser'" in err


@pytest.mark.parametrize("command", [(), ("--help",), *((name, "--help") for name in cli.COMMANDS)])
def test_help_has_examples(certipatch, command):
    code, out, _ = certipatch(*command)
    assert code == 0
    assert "certipatch" in out
    if command and command[0] != "--help":
        assert "Example" in out


BAD_THREATS = [
    (("--patch", "5x"), "5x"),
    (("--patch", "-3"), "-3"),
    (("--patch", "0"), "0"),
    (("--patch", "0%"), "0%"),
    (("--patch", "13"), "13x13"),
    (("--patch", "2x13"), "2x13"),
    (("--patch", "2", "--shape", "star"), "star"),
    (("--patch", "2", "--count", "0"), "0"),
    (("--patch", "2", "--where", "11,11"), "leaves the picture"),
    (("--patch", "2", "--where", "middle"), "middle"),
    (("--sparse", "-1"), "-1"),
    (("--sparse", "200"), "200"),
    (("--patch", "2", "--sparse", "2"), "either"),
    ((), "--patch"),
]


@pytest.mark.parametrize(("threat", "said"), BAD_THREATS)
def test_bad_threats(certipatch, tmp_path, threat, said):
    line = refused(certipatch("certify", "good.png", "--defense", "model", *threat))
    assert said in line
    line = refused(certipatch("evaluate", "--defense", "model", "--data", "stripes", "--out", tmp_path / "r", *threat))
    assert said in line
    assert not (tmp_path / "r").exists()


def test_bad_pictures(certipatch, tmp_path):
    good = stripes(1, 0)[0][0]
    files = {
        "no-picture.png": b"this is no picture",
        "empty.png": b"",
        "truncated.png": good[: len(good) // 2],
        "large.png": png(np.zeros((13, 12), np.uint8)),
        "colour.png": png(np.zeros((12, 12, 3), np.uint8)),
    }
    said = {"large.png": "13x12", "colour.png": "RGB"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        line = refused(certipatch("certify", tmp_path / name, "--defense", "model", "--patch", "2"))
        assert name in line
        assert said.get(name, "") in line
    for name in ("missing.png", "."):
        refused(certipatch("certify", tmp_path / name, "--defense", "model", "--patch", "2"))


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5, float("inf")])
def test_bad_pixel_values(home, value):
    images = torch.full((1, 1, 12, 12), 0.5)
    images[0, 0, 3, 3] = value
    with pytest.raises(cp.InputError, match=r"NaN|\[0, 1\]"):
        cp.load(str(home / "model")).certify(images, cp.PatchThreat(2))


def test_unknown_names_suggest_the_nearest(certipatch, tmp_path):
    assert "fashion-columns" in refused(
        certipatch("certify", "good.png", "--defense", "fashion-colums", "--patch", "2")
    )
    command = ("evaluate", "--defense", "model", "--patch", "2", "--out", tmp_path / "r", "--data")
    assert "mnist" in refused(certipatch(*command, "mnits"))
    line = refused(certipatch(*command, "stripes", "--split", "validation"))
    assert "test" in line
    assert "train" in line
    assert "mnist-columns" in refused(certipatch("train", "mnist-colums"))
    assert "evaluate" in refused(certipatch("evalute"))
    assert "--data" in refused(certipatch("evaluate", "--defense", "model"))


def copy_of(model: Path, target: Path) -> Path:
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_bad_weights_and_cards(certipatch, home, tmp_path):
    import hashlib

    def command(folder: Path) -> str:
        return refused(certipatch("certify", "good.png", "--defense", folder, "--patch", "2"))

    truncated = copy_of(home / "model", tmp_path / "truncated")
    weights = truncated / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "sha256" in command(truncated)
    card = json.loads((truncated / "card.json").read_text())

    def rename(folder: Path, **changes: object) -> None:
        digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        (folder / "card.json").write_text(json.dumps(card | changes | {"sha256": digest}))

    rename(truncated)
    assert "safetensors" in command(truncated)
    foreign = copy_of(home / "model", tmp_path / "foreign")
    save_file({"other": torch.zeros(3)}, foreign / "weights.safetensors")
    rename(foreign)
    assert "does not hold the weights" in command(foreign)
    pickled = copy_of(home / "model", tmp_path / "pickled")
    torch.save(load_file(home / "model" / "weights.safetensors"), pickled / "weights.safetensors")
    rename(pickled)
    assert "safetensors" in command(pickled)
    greedy = copy_of(home / "model", tmp_path / "greedy")
    rename(greedy, model={"name": "strip", "widths": [4096] * 8, "depth": 32})
    assert "does not hold the weights" in command(greedy)
    rename(greedy, model={"name": "strip", "widths": [10**9]})
    assert "widths" in command(greedy)
    rename(greedy, views={"name": "columns", "width": 99})
    assert "99" in command(greedy)
    (greedy / "card.json").write_text("{")
    command(greedy)
    (greedy / "card.json").unlink()
    assert "no trained defense" in command(greedy)


def test_a_run_of_another_configuration(certipatch, tmp_path):
    command = ("evaluate", "--defense", "model", "--data", "stripes", "--limit", "4", "--out", tmp_path / "run")
    assert certipatch(*command, "--patch", "2")[0] == 0
    assert "threat: size is [2, 2] there, [3, 3] here" in refused(certipatch(*command, "--patch", "3"))
    attack = ("attack", *command[1:], "--patch", "2")
    assert "command is evaluate there, attack here" in refused(certipatch(*attack))


@pytest.mark.slow
def test_more_patches_than_columns_are_as_many_as_columns(certipatch):
    code, out, _ = certipatch("certify", "good.png", "--defense", "model", "--patch", "1", "--count", "500")
    assert code == 0
    assert "NOT certified against 500 patches" in out


def test_an_option_that_is_not_known_leaves_no_folder_behind(certipatch, tmp_path):
    command = ("attack", "--defense", "model", "--data", "stripes", "--patch", "2", "--out", tmp_path / "run")
    assert "use one of random, exhaustive" in refused(certipatch(*command, "--search", "everywhere"))
    assert not (tmp_path / "run").exists()


def test_settings_that_are_not_known_are_told_with_those_that_are(certipatch, tmp_path):
    command = ("evaluate", "--defense", "model", "--data", "stripes", "--patch", "2", "--out", tmp_path / "run")
    line = refused(certipatch(*command, "--set", "nonsense=2"))
    assert line.endswith("nonsense: there is no such setting; there are threshold, margin")
    assert "threshold: Input should be" in refused(certipatch(*command, "--set", "threshold=high"))
    line = refused(certipatch("train", "r.yaml", "--set", "epoch=3", "--out", tmp_path / "model"))
    assert "epoch: there is no such setting; there are defense, settings" in line
    line = refused(certipatch("train", "r.yaml", "--set", "model.dpth=2", "--out", tmp_path / "model"))
    assert line.endswith("model: the strip network has no 'dpth'; it has name, widths, depth")
    line = refused(certipatch("train", "r.yaml", "--set", "model.name=specialists", "--out", tmp_path / "model"))
    assert "model.name: specialists has a new name: use fallback-ensemble" in line


def test_pictures_of_the_training_are_told(certipatch, tmp_path):
    command = ("evaluate", "--defense", "model", "--data", "stripes", "--patch", "2")
    _, _, err = certipatch(*command, "--split", "train", "--limit", "5", "--out", tmp_path / "train")
    assert (
        "note: model was trained on stripes train; accuracy on its own training data is not meaningful; choose another --split"
        in err
    )
    _, _, err = certipatch(*command, "--limit", "5", "--out", tmp_path / "test")
    assert "note: " not in err


def test_classes_that_are_called_otherwise_are_told(certipatch, tmp_path, home):
    for number, name in enumerate(("bottom", "middle", "top")):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        (tmp_path / "data" / "test" / name / "a.png").write_bytes(stripes(3, 5)[number][0])
    command = ("--defense", "model", "--data", tmp_path / "data", "--patch", "2", "--out")
    for name in ("evaluate", "attack"):
        more = ("--starts", "1", "--steps", "1") if name == "attack" else ()
        code, _, err = certipatch(name, *command, tmp_path / name, *more)
        assert code == 0
        notes = [line for line in err.splitlines() if line.startswith("note: ")]
        assert len(notes) == 1
        assert "matched by number" in notes[0]
    (tmp_path / "data" / "test" / "bottom").rename(tmp_path / "data" / "test" / "2")  # 0 there, 2 of the model
    line = refused(certipatch("evaluate", *command, tmp_path / "other"))
    assert "both know '2', but number it differently, and model does not know 'middle', 'top'" in line


def test_all_pictures_that_cannot_be_used_are_told(certipatch, tmp_path, home):
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(b"")
    files = ("good.png", tmp_path / "one.png", tmp_path / "two.png")
    line = refused(certipatch("certify", *files, "--defense", "model", "--patch", "2"))
    assert "2 of 3 pictures cannot be used" in line
    assert "one.png' is empty" in line
    assert "two.png' is empty" in line


def test_another_number_of_pictures_is_told_as_such(certipatch, tmp_path):
    command = ("evaluate", "--defense", "model", "--data", "stripes", "--patch", "2", "--out", tmp_path / "run")
    assert certipatch(*command, "--limit", "3")[0] == 0
    assert "images is 3 there, 4 here" in refused(certipatch(*command, "--limit", "4"))


def test_no_room_on_the_disk_loses_nothing(certipatch, tmp_path, monkeypatch):
    from certipatch.plumbing import files
    from certipatch.runs import run

    monkeypatch.setattr(run, "PART", 10)
    write, written = pq.write_table, []

    def full(table, path, **options):
        written.append(path)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(table, path, **options)

    command = ("evaluate", "--defense", "model", "--data", "stripes", "--patch", "2", "--out", tmp_path / "run")
    monkeypatch.setattr(files.pq, "write_table", full)
    assert "No space left" in refused(certipatch(*command))
    kept = sorted((tmp_path / "run" / "records").glob("part-*.parquet"))
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(files.pq, "write_table", write)
    assert certipatch(*command)[0] == 0
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_no_permission_to_write(certipatch, tmp_path, monkeypatch):
    def forbidden(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    command = ("evaluate", "--defense", "model", "--data", "stripes", "--patch", "2", "--out", tmp_path / "run")
    assert "Permission denied" in refused(certipatch(*command))
    assert "Permission denied" in refused(certipatch("train", "r.yaml", "--out", tmp_path / "model"))


def test_ctrl_c_exits_with_130(certipatch, tmp_path, monkeypatch):
    from certipatch.runs import evaluate

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "write_part", interrupted)
    command = ("evaluate", "--defense", "model", "--data", "stripes", "--patch", "2", "--out", tmp_path / "run")
    code, _, err = certipatch(*command)
    assert code == 130
    assert err.splitlines()[-1] == "stopped; run the same command again to go on"


def test_progress_off_a_terminal_tells_of_each_of_several_parts(capsys):
    from certipatch.cli.progress import progress_bar

    with progress_bar("table") as progress:
        for part in ("one", "two"):
            for done in range(0, 101, 2):
                progress(done, 100, part)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22
    assert lines[0] == "table: 0/100  one"
    assert lines[11:13] == ["table: 0/100  two", "table: 10/100  two"]
