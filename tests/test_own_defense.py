"""A defense of somebody else: one file outside of the source tree, registered by an entry point, under every command."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import stripes, write_parquet, write_recipe
from torch import nn

import certipatch as cp
from certipatch import cli
from certipatch.defenses import METHODS
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.method import Method
from certipatch.defenses.registry import OWN
from certipatch.errors import InputError
from certipatch.export import AsGraph
from certipatch.testing import check_defense, check_rule, extremes
from certipatch.training import read, train

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_defense.py"
BORDA = ("--data", "stripes", "--patch", "1", "--limit", "6")


def install(site: Path, name: str = "borda", entry: str = "own_defense:Borda") -> Path:
    """What an installer leaves of a package that registers a defense: its module and its entry point."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[certipatch.defenses]\n{name} = {entry}\n")
    (site / "own_defense.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    return site


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder outside of the source tree: the installed package, pictures, and a network trained for its defense."""
    folder = tmp_path_factory.mktemp("home")
    sys.path.insert(0, str(install(folder / "site")))
    importlib.invalidate_caches()
    write_parquet(folder / "stripes")
    (folder / "one.png").write_bytes(stripes(1, 5)[0][0])
    write_recipe(folder / "r.yaml", data=str(folder / "stripes"), epochs=8, defense="borda", settings={"ranks": 1})
    train(read(folder / "r.yaml"), folder / "model")
    yield folder
    sys.path.remove(str(folder / "site"))
    sys.modules.pop("own_defense", None)


@pytest.fixture
def certipatch(monkeypatch, capsys, home):
    """Run a command in that folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(home)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["certipatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def test_the_file_is_short_and_outside():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 120
    assert "borda" not in OWN


def test_another_process_lists_it(home):
    """From its entry point alone, in a folder that is not ours."""
    source = str(Path(cp.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home / "site"), source])}
    command = [sys.executable, "-m", "certipatch", "list", "defenses", "borda", "--json"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["settings"] == {"ranks": 2}
    assert listed["text"].startswith("Every band ranks the classes")


def test_every_command_takes_it(certipatch, home):
    code, out, err = certipatch("list", "defenses")
    assert code == 0, err
    assert "borda" in out
    code, out, err = certipatch("evaluate", "--defense", "model", *BORDA, "--out", "own", "--json")
    assert code == 0, err
    evaluated = json.loads(out)
    assert evaluated["theorem"].startswith("s_y − s_k − 1·|A| ≥ [y > k]")
    assert 0 < evaluated["certified_accuracy"] <= evaluated["clean_accuracy"]
    wrapped = ("--defense", "borda", "--model", "model", "--set", "ranks=2")
    assert certipatch("evaluate", *wrapped, *BORDA, "--out", "two", "--json")[0] == 0
    code, out, err = certipatch("certify", "one.png", *wrapped, "--patch", "1", "--out", "one", "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["margin"] is not None
    few = ("--starts", "2", "--steps", "6", "--step", "0.2")
    code, out, err = certipatch("attack", "--defense", "model", *BORDA, *few, "--out", "attacked", "--json")
    assert code == 0, err
    attacked = json.loads(out)
    assert attacked["attack"] == "patch-pgd"
    assert attacked["broken_certificates"] == 0
    assert attacked["certified_accuracy"] <= attacked["attacked_accuracy"] <= attacked["clean_accuracy"]
    for run in ("own", "one", "attacked"):
        code, _, err = certipatch("report", run)
        assert code == 0, err
    assert "It is certified if the theorem holds: s_y − s_k" in (home / "own" / "report.html").read_text()
    code, out, err = certipatch("compare", "own", "two")
    assert code == 0, err
    assert "two" in out
    code, _, err = certipatch("export", "model", "--onnx", "model.onnx")
    assert code == 2
    assert err.strip().splitlines()[-1].endswith("the rule BordaCount has no graph")


def test_bad_settings_are_named(certipatch):
    code, _, err = certipatch(
        "evaluate", "--defense", "borda", "--model", "model", *BORDA, "--set", "ranks=0", "--out", "x"
    )
    assert code == 2
    assert "ranks: Input should be greater than or equal to 1" in err
    borda = METHODS["borda"]
    with pytest.raises(InputError, match=r"ranks: .*, not 0"):
        borda(nn.Identity(), cp.views.Columns(3), ranks=0)


def points(generator, relation, classes):
    """0, 1 or 2 points (B, V, K), more for class 0."""
    given = torch.randint(0, 3, (4, relation.shape[1], classes), generator=generator)
    given[..., 0] = given[..., 0].maximum(torch.randint(1, 3, given.shape[:2], generator=generator))
    return given


def test_its_theorem_holds(home):
    module = importlib.import_module("own_defense")

    check_rule(module.BordaCount(1), views=4, classes=3, exact=True)
    check_rule(module.BordaCount(2), views=4, classes=3, evidence=points, attacks=extremes(0.0, 2.0), exact=True)
    defense = cp.load(str(home / "model"))
    images = cp.data.load(str(home / "stripes")).images(range(4))
    check_defense(defense, images, cp.PatchThreat(1), trials=8)


def test_defaults_of_a_defense_that_says_nothing():
    """Attacked by the mean of its soft evidence, refused by export."""
    borda = METHODS["borda"]
    assert borda.leads is ViewDefense.leads
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 3)).eval()
    defense = borda(network, cp.views.Columns(2))
    images = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leads = defense.leads(images, torch.Generator())
    assert leads.shape == (2, 3)
    (gradient,) = torch.autograd.grad(leads[:, 0].sum(), images)
    assert bool((gradient != 0).any())
    with pytest.raises(InputError, match="the rule BordaCount has no graph"):
        AsGraph(defense, (6, 6), 1)


SILENT = '''
"""A defense that says nothing of how it is attacked: it has no views and no soft version."""
from typing import ClassVar
from certipatch.defenses.undefended import Undefended
from certipatch import Defense

class Silent(Defense):
    """The network's answer, certified nowhere."""
    name: ClassVar[str] = "silent"
    reads_whole_images = True
    theorem = "none: nothing is certified"
    def __init__(self, model, batch_size=None):
        self.inner, self.model = Undefended(model, batch_size), model
    def evidence(self, images): return self.inner.evidence(images)
    def label(self, evidence): return self.inner.label(evidence)
    def certificate(self, evidence, threat): return self.inner.certificate(evidence, threat)
    def check(self, images): self.inner.check(images)
    def forward_passes(self, image_size): return 1
'''


def test_without_a_soft_version_square_attacks(certipatch, tmp_path, monkeypatch, home):
    install(tmp_path / "site", "silent", "silent_defense:Silent")
    (tmp_path / "site" / "silent_defense.py").write_text(SILENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plain = {"views": None, "model": {"name": "mlp", "widths": [16]}, "defense": "silent", "objective": {}}
    write_recipe(tmp_path / "p.yaml", data=str(home / "stripes"), epochs=2, **plain)
    train(read(tmp_path / "p.yaml"), tmp_path / "plain")
    assert METHODS["silent"].leads is Method.leads
    few = ("--starts", "1", "--steps", "5", "--json", "--out", tmp_path / "run")
    code, out, err = certipatch("attack", "--defense", tmp_path / "plain", *BORDA, *few)
    assert code == 0, err
    assert json.loads(out)["attack"] == "square"
    assert "has no soft version to follow, so square attacks it" in err
    code, _, err = certipatch("export", tmp_path / "plain", "--onnx", tmp_path / "x.onnx")
    assert code == 2
    assert "silent cannot be exported: its answers have no graph" in err


def test_a_package_cannot_break_or_replace_ours(certipatch, tmp_path, monkeypatch):
    install(tmp_path / "a", "broken", "no_such_module:Nothing")
    install(tmp_path / "b", "patchguard", "own_defense:Borda")
    install(tmp_path / "c", "other", "own_defense:Borda")
    for part in "abc":
        monkeypatch.syspath_prepend(str(tmp_path / part))
    assert METHODS["patchguard"] is cp.PatchGuard
    with pytest.raises(InputError, match=r"the defense broken .*cannot be imported: ModuleNotFoundError"):
        METHODS["broken"]
    with pytest.raises(InputError, match=r"not a subclass of certipatch\.Defense with the name 'other'"):
        METHODS["other"]
    with pytest.raises(KeyError):
        METHODS["nothing"]
    assert "nothing" not in METHODS
    assert len(list(METHODS)) == len(METHODS) == len(set(METHODS))
    code, out, err = certipatch("list", "defenses", "--json")
    assert code == 0, err
    assert "cannot be imported" in json.loads(out)["defenses"]["broken"]
    code, _, err = certipatch("evaluate", "--defense", "broken", "--model", "model", *BORDA, "--out", tmp_path / "run")
    assert code == 2
    assert "cannot be imported" in err
