"""The shipped models: they load, are what their cards say, and stand up to the soundness kit on real pictures."""

import re
from pathlib import Path

import pytest
import torch

import certipatch as cp
from certipatch import defenses
from certipatch.data import load

ROOT = Path(__file__).parents[1]
NAMES = ("fashion-columns", "mnist-columns", "mnist-columns-votes", "mnist-patchguard", "mnist-plain")


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


@pytest.mark.parametrize("name", NAMES)
def test_every_named_model_loads_and_says_where_its_numbers_come_from(name):
    _, card = defenses.open_defense(name)
    assert card.name == name
    assert (ROOT / "zoo" / name / "weights.safetensors").stat().st_size <= 2 * 2**20
    assert card.recipe["name"] == name
    for metric in card.metrics:
        assert metric["images"] == 10_000
        low, high = metric["certified_ci95"]
        assert low <= metric["certified_accuracy"] <= high


def test_fashion_on_the_sample_is_near_its_card(sample):
    defense, card = defenses.open_defense("fashion-columns")
    found = [defense.certify(sample.images(range(i, i + 250)), cp.PatchThreat(5)) for i in range(0, 1000, 250)]
    right = torch.cat([part.label for part in found]) == torch.from_numpy(sample.labels)
    robust = right & torch.cat([part.certified for part in found])
    assert abs(right.double().mean().item() - card.metrics[0]["clean_accuracy"]) < 0.04
    assert abs(robust.double().mean().item() - card.metrics[0]["certified_accuracy"]) < 0.05


def test_mnist_is_near_its_card():
    pictures = mnist()
    if pictures is None:
        pytest.skip("needs MNIST in $CERTIPATCH_DATA/mnist")
    defense, card = defenses.open_defense("mnist-columns")
    found = [defense.certify(pictures.images(range(i, i + 250)), cp.PatchThreat(5)) for i in range(0, 1000, 250)]
    right = torch.cat([part.label for part in found]) == torch.from_numpy(pictures.labels)
    robust = right & torch.cat([part.certified for part in found])
    assert abs(right.double().mean().item() - card.metrics[0]["clean_accuracy"]) < 0.03
    assert abs(robust.double().mean().item() - card.metrics[0]["certified_accuracy"]) < 0.06


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
