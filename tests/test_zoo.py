"""The shipped models: they load, are what their cards say, and stand up to the soundness kit on real pictures."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

import certipatch as cp
from certipatch import saved
from certipatch.data import load
from certipatch.errors import InputError

ROOT = Path(__file__).parents[1]
NAMES = tuple(sorted(path.parent.name for path in (ROOT / "zoo").glob("*/card.json")))
NAMED = {
    "fashion-columns",
    "mnist-columns",
    "mnist-columns-votes",
    "mnist-patchguard",
    "mnist-plain",
    "mnist-ibp-2",
    "mnist-ibp-5",
    "mnist-ibp-5-mlp",
    "mnist-ibp-sparse-4",
    "mnist-ibp-sparse-4-mlp",
    "imagenette-columns",
    "imagenette-double-mask",
    "mnist-double-mask",
    "cifar10-bagnet",
    "cifar10-columns",
    "cifar10-ibp-5",
    "cifar10-ibp-2",
    "cifar10-double-mask",
    "cifar10-patchguard",
    "cifar10-plain",
}


@pytest.fixture(scope="module")
def sample():
    return load("fashion-sample")


def mnist():
    """Real MNIST from $CERTIPATCH_DATA or the shared folder beside the checkout; None if it is not there."""
    import os

    for root in (os.environ.get("CERTIPATCH_DATA"), ROOT.parent / "shared" / "data"):
        if root and (Path(root) / "mnist").is_dir():
            return load(str(Path(root) / "mnist"), "test", limit=1000)
    return None


def size(name):
    """Bytes of a model's weights."""
    return (ROOT / "zoo" / name / "weights.safetensors").stat().st_size


def test_the_repository_holds_every_named_model_and_the_wheel_the_small_ones():
    assert set(NAMES) >= NAMED
    assert sum(size(name) for name in NAMES) <= 60e6
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    shipped = {Path(source).name for source in build["force-include"] if source.startswith("zoo/")}
    assert shipped == {name for name in NAMES if size(name) <= 2e6}


def test_a_name_that_has_a_recipe_but_no_weights_says_how_to_train_it(monkeypatch):
    monkeypatch.setattr(saved.open.resources, "find", lambda kind, name: None if kind == "zoo" else ROOT / kind / name)
    with pytest.raises(InputError, match=r"certipatch train recipes/cifar10-columns\.yaml"):
        saved.locate("cifar10-columns")


@pytest.mark.parametrize("name", NAMES)
def test_every_named_model_loads_and_says_where_its_numbers_come_from(name):
    _, card = saved.open_defense(name)
    assert card.name == name
    assert size(name) <= 10e6
    assert card.recipe["name"] == name
    for metric in card.metrics:
        slow = card.defense == "patchcleanser" or (card.defense == "interval-bounds" and card.model.name == "cnn")
        assert metric["images"] >= (500 if card.image_size[0] > 32 else 1_000 if slow else 10_000)
        low, high = metric["certified_ci95"]
        assert low <= metric["certified_accuracy"] <= high


@pytest.mark.slow
def test_fashion_on_the_sample_is_near_its_card(sample):
    defense, card = saved.open_defense("fashion-columns")
    found = [defense.certify(sample.images(range(i, i + 250)), cp.PatchThreat(5)) for i in range(0, 1000, 250)]
    right = torch.cat([part.label for part in found]) == torch.from_numpy(sample.labels)
    robust = right & torch.cat([part.certified for part in found])
    assert abs(right.double().mean().item() - card.metrics[0]["clean_accuracy"]) < 0.04
    assert abs(robust.double().mean().item() - card.metrics[0]["certified_accuracy"]) < 0.05


@pytest.mark.slow
def test_mnist_is_near_its_card():
    pictures = mnist()
    if pictures is None:
        pytest.skip("needs MNIST in $CERTIPATCH_DATA/mnist")
    defense, card = saved.open_defense("mnist-columns")
    found = [defense.certify(pictures.images(range(i, i + 250)), cp.PatchThreat(5)) for i in range(0, 1000, 250)]
    right = torch.cat([part.label for part in found]) == torch.from_numpy(pictures.labels)
    robust = right & torch.cat([part.certified for part in found])
    assert abs(right.double().mean().item() - card.metrics[0]["clean_accuracy"]) < 0.03
    assert abs(robust.double().mean().item() - card.metrics[0]["certified_accuracy"]) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("threat", [cp.PatchThreat(5), cp.PatchThreat(3, count=2), cp.PatchThreat(16, shape="line")])
def test_no_pasted_patch_breaks_a_certificate(sample, threat):
    defense = cp.load("fashion-columns")
    report = cp.testing.check_defense(defense, sample.images(range(6)), threat, trials=8)
    assert report.attacks > 0
    assert report.certified > 0


def test_the_readme_example_runs(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "certified" in capsys.readouterr().out
    assert text.index("make demo") < text.index("make test") < text.index("##")
