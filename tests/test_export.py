"""Defenses as ONNX files: onnxruntime gives the labels that ``predict`` gives."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import certipatch as cp
from certipatch import data, defenses, models, rules
from certipatch import views as vw
from certipatch.defenses import MinorityReports, PatchCleanser, PatchCURE, Undefended
from certipatch.errors import InputError
from certipatch.export import AsGraph, to_onnx
from certipatch.models import Cascade, FallbackEnsemble
from certipatch.saved import Card, open_defense
from certipatch.views.render import null, render

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
onnx = pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxscript", reason="needs onnxscript")
SIZE = (12, 12)


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return data.load("fashion-sample").images(range(24))


def answers(path, images: torch.Tensor) -> list[torch.Tensor]:
    """What onnxruntime says, alone and in a batch."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    together = [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]
    alone = [torch.from_numpy(found) for found in session.run(None, {"images": images[:1].numpy()})]
    for one, all_of_them in zip(alone, together, strict=True):
        assert torch.equal(one, all_of_them[:1])
    return together


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist-columns", "mnist-columns-votes", "fashion-columns"])
def test_zoo_models_answer_alike_in_onnxruntime(name, sample, tmp_path):
    defense, card = open_defense(name)
    found = to_onnx(defense, card, tmp_path / "model.onnx")
    assert found["checked"] == 4
    assert found["outputs"] == ("label",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    (label,) = answers(tmp_path / "model.onnx", sample)
    assert torch.equal(label, defense.predict(sample))
    assert len(label.unique()) > 3
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(about["classes"]) == list(card.classes)
    assert about["model_sha256"] == card.sha256


def network(views: vw.Views | None, **settings) -> torch.nn.Module:
    """A random network of five classes, each of which it finds in some pictures."""
    torch.manual_seed(0)
    found = models.NETWORKS[settings["name"]](**settings).build(views, 1, 5, SIZE).eval().requires_grad_(False)
    for tensor in found.parameters():
        tensor += 0.2 * torch.randn(tensor.shape)
    heads = [
        module for module in found.modules() if getattr(module, "out_features", getattr(module, "out_channels", 0)) == 5
    ]

    def centre(head, inputs, output):
        logits = output.transpose(1, -1).flatten(0, -2)
        scale = logits.std(0).view(-1, *[1] * (head.weight.ndim - 1)) / 2
        head.weight /= scale
        head.bias.copy_((head.bias - logits.mean(0)) / scale.flatten())

    hooks = [head.register_forward_hook(centre) for head in heads]
    index = None if views is None else torch.arange(views.number(SIZE))
    shown = (
        whole(found)
        if index is None or found.encoding == "all-views"
        else render(found.encoding, pictures(20, 0), views, index).flatten(0, 1)
    )
    found(shown)
    for hook in hooks:
        hook.remove()
    return found


def pictures(count: int, seed: int) -> torch.Tensor:
    """Nine squares of some brightness each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(count, 1, 3, 3, generator=generator) ** 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (coarse + 0.1 * torch.rand(count, 1, *SIZE, generator=generator)).clamp(0, 1)


def whole(found: torch.nn.Module) -> torch.Tensor:
    """Twenty pictures of which nothing is hidden, as a network reads them."""
    shown = pictures(20, 0)
    return null(shown, torch.ones(1, *SIZE, dtype=torch.bool))[:, 0] if found.encoding == "null" else shown


VIT = {"name": "vit", "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 2}
CONV = {"name": "conv", "widths": (8, 8)}
SHARED_VIT = {"embed_dim": 8, "front_depth": 1, "depth": 1, "num_heads": 2}
THREAT = cp.PatchThreat(2)


def cascade(encoding: str = "fill") -> Cascade:
    """Of two networks; the first is confident about half of the pictures."""
    first = network(None, **CONV, encoding=encoding)
    found = Cascade([first, network(None, name="conv", widths=(4, 8))], flip_tta=True).eval()
    best = first(whole(first)).softmax(1).topk(2, 1).values
    found.exit_gap = float((best[:, 0] - best[:, 1]).median())
    return found


def fallback_ensemble() -> FallbackEnsemble:
    """A cascade for masked pictures, and another network for whole ones."""
    return FallbackEnsemble([cascade(), network(None, name="conv", widths=(8, 8))]).eval()


def composed(name: str) -> defenses.Defense:
    """Defenses of all encodings and rules."""
    columns, cross = vw.Columns(3, 2), vw.Cross(3, 2)
    local = network(None, name="small-bagnet", receptive_field=10, widths=(4, 4, 8, 8))
    return {
        "votes of a ViT": lambda: cp.DerandomizedSmoothing(network(columns, **VIT), columns, threshold=None),
        "cropped columns": lambda: cp.BagCert(network(columns, **CONV), columns),
        "cropped blocks": lambda: cp.ClippedBagNet(network(vw.Blocks(4, 3), **CONV), vw.Blocks(4, 3)),
        "cropped cross": lambda: cp.PatchGuard(network(cross, **CONV), THREAT, cross),
        "NULL-encoded": lambda: cp.PatchGuard(network(columns, name="resnet18", widths=(4, 4), depth=1), THREAT, columns,
                                              threshold=0.3),
        "local logits": lambda: cp.PatchGuard(local, cp.PatchThreat(1), clip=2.0),
        "detection": lambda: cp.PatchGuardPlusPlus(local, cp.PatchThreat(1), threshold=0.5),
        "double masking": lambda: PatchCleanser(network(None, **CONV), THREAT, masks=3),
        "shared front": lambda: PatchCURE(network(None, name="shared-vit", **SHARED_VIT), THREAT, masks=3),
        "double masking of a shared ViT": lambda: PatchCleanser(
            network(None, name="shared-vit", **SHARED_VIT), THREAT, masks=2),
        "double masking of a ViT": lambda: PatchCleanser(network(None, **VIT), THREAT, masks=2),
        "double masking of a cascade": lambda: PatchCleanser(cascade(), THREAT, masks=3, min_mean_gap=0.2),
        "double masking with finer masks": lambda: PatchCleanser(
            network(None, **CONV), THREAT, masks=2, subdivisions=2, exit_gap=0.4),
        "double masking and the whole picture": lambda: PatchCleanser(
            fallback_ensemble(), THREAT, masks=2, subdivisions=2, exit_gap=0.4, fallback="unmasked"),
        "double masking of a NULL-encoded cascade": lambda: PatchCleanser(cascade("null"), THREAT, masks=3, min_mean_gap=0.2),
        "minority reports": lambda: MinorityReports(network(None, **CONV), THREAT, masks=3, threshold=0.35),
        "undefended": lambda: Undefended(network(None, **CONV)),
    }[name]()  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["votes of a ViT", "cropped columns", "cropped blocks", "cropped cross", "NULL-encoded",
                                  "local logits", "detection", "double masking", "double masking of a ViT",
                                  "double masking of a cascade", "double masking with finer masks",
                                  "double masking and the whole picture",
                                  "double masking of a NULL-encoded cascade", "shared front", "minority reports",
                                  "undefended"])  # fmt: skip
def test_graphs_answer_as_the_defense(name):
    defense = composed(name)
    images = pictures(40, 1)
    with torch.inference_mode():
        label, *alarm = AsGraph(defense, SIZE, 1)(images)
    found = defense.certify(images, THREAT)
    assert torch.equal(label, found.label)
    assert len(label.unique()) > 1
    if defense.notion == "detection":
        assert torch.equal(alarm[0], found.alarm)
        assert 0 < found.alarm.sum() < 40
    else:
        assert not alarm


CARD = {"name": "mine", "defense": "undefended", "model": CONV, "image_size": SIZE, "channels": 1,
        "classes": list("abcde"), "sha256": ""}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "shared front",
        "double masking of a shared ViT",
        "double masking of a cascade",
        "double masking of a NULL-encoded cascade",
        "double masking with finer masks",
        "double masking and the whole picture",
        "votes of a ViT",
        "detection",
    ],
)
def test_further_defenses_as_files(name, tmp_path):
    defense = composed(name)
    to_onnx(defense, Card(**CARD), tmp_path / "model.onnx")
    images = pictures(10, 2)
    label, *alarm = answers(tmp_path / "model.onnx", images)
    found = defense.certify(images, THREAT)
    assert torch.equal(label, found.label)
    assert all(torch.equal(one, found.alarm) for one in alarm)


@pytest.mark.parametrize("rule", [rules.Median(), rules.TrimmedMean(2, lo=-0.5), rules.DoubleMask(), rules.DoubleMask(0.5),
                                  rules.DoubleMask(0.2, "unmasked"),
                                  rules.RobustMask(torch.eye(10).bool(), 0.4, 1.0)], ids=lambda r: type(r).__name__)  # fmt: skip
def test_rules_as_graphs(rule):
    views = 10 + getattr(rule, "unmasked", False)
    evidence = torch.randn(200, views, 3, generator=torch.Generator().manual_seed(3))
    (label,) = rule.graph(views, 3)(evidence, None)
    assert torch.equal(label, rule.predict(evidence))


@pytest.mark.slow
def test_a_file_with_another_alarm_is_not_written(monkeypatch, tmp_path):
    defense = composed("minority reports")
    true = type(defense).certify
    turned = lambda self, *given: replace(found := true(self, *given), alarm=~found.alarm)  # noqa: E731
    monkeypatch.setattr(type(defense), "certify", turned)
    with pytest.raises(InputError, match=r"but the defense .* not written"):
        to_onnx(defense, Card(**CARD), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_has_no_graph_says_so(monkeypatch, tmp_path):
    views = vw.Columns(3)
    sampled = cp.RandomizedAblation(network(views, **CONV), views, samples=10, samples_to_pick=5)
    with pytest.raises(InputError, match="randomized-ablation cannot be exported: its answers rest on random draws"):
        AsGraph(sampled, SIZE, 1)
    for empirical in (defenses.LocalGradientsSmoothing, defenses.DigitalWatermarking):
        cleaning = empirical(models.ConvNet(None, 1, 2, SIZE, (4,)).eval())
        with pytest.raises(InputError, match=f"{empirical.name} cannot be exported: its answers have no graph"):
            AsGraph(cleaning, SIZE, 1)  # type: ignore[arg-type]
    many = PatchCleanser(models.ConvNet(None, 1, 2, (128, 128), (4,)).eval(), cp.PatchThreat(10), masks=6)
    with pytest.raises(InputError, match=r"666 views of 128x128 .* --set masks=3"):
        AsGraph(many, (128, 128), 1)
    monkeypatch.setattr("certipatch.export.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx and onnxscript: pip install 'certipatch\[onnx\]'"):
        to_onnx(composed("undefended"), Card(**CARD), tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_command(monkeypatch, capsys, tmp_path):
    from certipatch.cli import main

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["certipatch", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    path = tmp_path / "double-masking.onnx"
    assert run("patchcleanser", "--model", "mnist-plain", "--patch", "5", "--set", "masks=2", "--onnx", path) == 0
    said = capsys.readouterr().out
    assert "images (batch x 1 x 28 x 28)" in said
    assert "same labels on 4 random pictures" in said
    assert path.stat().st_size > 100_000
    assert "against 5x5 pixels" in said
    (tmp_path / "toy_exported.py").write_text(
        "from torch import nn\n\ndef network():\n"
        "    found = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4)).eval()\n"
        "    found.image_size = (12, 12)\n    return found\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ("--model", "toy_exported:network", "--set", "masks=2", "--onnx", tmp_path / "own.onnx")
    assert run("patchcleanser", *own) == 2
    assert "give --patch" in capsys.readouterr().err
    assert run("patchcleanser", *own, "--patch", "3") == 0
    assert "against 3x3 pixels" in capsys.readouterr().out
    (label,) = answers(tmp_path / "own.onnx", torch.rand(5, 3, *SIZE))
    assert label.shape == (5,)
    box = ("--model", f"onnx:{tmp_path / 'own.onnx'}", "--patch", "3", "--onnx", tmp_path / "box.onnx")
    assert run("undefended", *box) == 2
    assert run("patchcleanser", "--model", "nonesuch", "--patch", "3", "--onnx", path) == 2
    assert "package.module:function" in capsys.readouterr().err
    assert run("fashion-columns", "--onnx", tmp_path / "no" / "file.onnx") == 2
    assert "folder that exists" in capsys.readouterr().err
    assert run("fashion-column", "--onnx", path) == 2
    assert "did you mean" in capsys.readouterr().err
