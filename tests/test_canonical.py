"""A picture's answer has the same bits whatever stands beside it; the model check asks every network that serves."""

import pytest
import torch
from torch import nn

import certipatch as cp
from certipatch import evidence as ev
from certipatch import views as vw
from certipatch.errors import InputError
from certipatch.inference import canonical_logits, is_position_free, rows_per_pass
from certipatch.model_check import check_model, hidden_tiles, networks_of, same_bits
from certipatch.models import ViT
from certipatch.models.cascade import Cascade
from certipatch.models.ensemble import Ensemble
from certipatch.saved import zoo
from certipatch.views.render import render_each

SIZE = (8, 8)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts back what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pictures(number, size=SIZE, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(number, channels, *size, generator=generator) * 255).round() / 255


# --- hidden values are selected away


class SignBit(nn.Module):
    """A network that tells −0.0 from 0.0, as 1/x, atan2 and copysign do."""

    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, rows):
        negative = torch.signbit(rows).flatten(1).any(1).float()
        return torch.stack([2 - 3 * negative, 0 * negative], 1)


@pytest.mark.parametrize("encoding", ["null", "fill"])
def test_the_sign_of_a_hidden_zero_is_hidden(encoding):
    defense = cp.PatchCleanser(SignBit(encoding).eval(), cp.PatchThreat(1), masks=2, fill=0.5)
    picture = torch.full((1, 1, 4, 4), 0.5)
    certificate = defense.certify(picture, cp.PatchThreat(1))
    assert certificate.certified.all()
    for location in range(16):
        attacked = picture.clone()
        attacked.view(-1)[location] = -0.0
        assert defense.predict(attacked) == certificate.label


@pytest.mark.parametrize("views", [vw.Columns(3), vw.Rows(2), vw.Blocks(3, 2), vw.Cross(3), vw.Columns(2, count=2)])
@pytest.mark.parametrize("encoding", ["null", "fill", "crop"])
def test_rendered_views_keep_their_bits_when_hidden_pixels_change(encoding, views):
    if encoding == "crop" and getattr(views, "count", 1) != 1:
        pytest.skip("a crop shows one band")
    index = torch.arange(views.number(SIZE))
    plain = pictures(1).expand(len(index), -1, -1, -1)
    shown = views.visible(SIZE, index)[:, None]
    for value in (0.0, -0.0, 1.0):
        changed = torch.where(shown, plain, torch.tensor(value))
        assert same_bits(
            render_each(encoding, plain, views, index, 0.5), render_each(encoding, changed, views, index, 0.5)
        )


# --- every network that may be asked is checked


class Sure(nn.Module):
    """Sure of every picture without a white pixel, so that a cascade does not ask its second network."""

    encoding = "picture"

    def forward(self, x):
        sure = 9 * (x.amax((1, 2, 3)) < 0.999).float()
        return torch.stack([sure, 0 * sure], 1)


class Coupled(nn.Module):
    """Standardises over the batch, as BatchNorm in training mode does."""

    encoding = "picture"

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        standard = (mean - mean.mean()) / (mean.std(correction=0) + 1e-3)
        return torch.stack([50 * standard + 1, 0 * standard], 1)


class Fallback(Sure):
    """Asks a network of its own about unmasked pictures."""

    @property
    def unmasked(self):
        return Coupled().eval()


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Coupled(), {}),
        (Cascade([Sure(), Coupled()]), {}),
        (Cascade([Sure(), Ensemble([Sure(), Coupled()])]), {}),
        (Ensemble([Sure(), Cascade([Sure(), Coupled()])]), {}),
        (Fallback(), {"fallback": "unmasked"}),
    ],
    ids=["alone", "cascade", "ensemble in a cascade", "cascade in an ensemble", "for unmasked pictures"],
)
def test_a_network_that_is_seldom_asked_is_checked_too(model, settings):
    defense = cp.PatchCleanser(model.eval(), cp.PatchThreat(1), masks=2, **settings)
    with pytest.raises(InputError, match=r"model refused: .*other pictures"):
        defense.check(torch.zeros(1, 1, 4, 4))


def test_a_faster_way_is_checked_with_its_members():
    cascade = Cascade([Sure(), Sure()]).eval()
    defense = cp.PatchCleanser(cascade, cp.PatchThreat(1), masks=2)
    assert len(networks_of(defense.model)) == 3
    defense.model.fast_forward_fingerprint = ev.weights_digest(cascade)
    defense.model.serve("another", cascade.with_parts([Sure(), Coupled().eval()]))
    with pytest.raises(InputError, match=r"model refused: .*other pictures"):
        defense.check(torch.zeros(1, 1, 4, 4))


class LeaksOnce(nn.Module):
    """Answers for all views; one of them looks at a single pixel that it should not see."""

    encoding = "all-views"

    def __init__(self, views, view, pixel):
        super().__init__()
        self.views, self.view, self.pixel = views, view, pixel

    def forward(self, x):
        shown = (x[:, None] * self.views.visible(tuple(x.shape[2:]))[None, :, None]).sum((2, 3, 4))
        leak = torch.zeros_like(shown)
        leak[:, self.view] = x[:, 0, self.pixel[0], self.pixel[1]]
        return torch.stack([shown + leak, shown * 0], -1)


@pytest.mark.parametrize("view", range(28))
def test_a_leak_in_any_view_is_found(view):
    views = vw.Columns(4)
    for far in (4, 15, 27):  # the first hidden column, one far off, the last hidden one
        model = LeaksOnce(views, view, (13, (view + far) % 28)).eval()
        with pytest.raises(InputError, match=rf"view {view} leaks|leaks: its answer depends on hidden pixels"):
            check_model(model, views, pictures(1, (28, 28)))


@pytest.mark.parametrize(
    "views",
    [vw.Columns(4), vw.Rows(3, stride=2), vw.Blocks(6, 2), vw.ReceptiveFields((17, 17), (8, 8), (0, 0), (3, 3))],
)
def test_tiles_cover_what_views_hide(views):
    shown = views.visible((32, 32))
    tiles = hidden_tiles(shown)
    blind = ~(shown[:, None] & tiles).flatten(2).any(2)  # (V, T)
    assert blind.any(0).all(), "a tile that every view sees tests nothing"
    assert (blind.any(1) | shown.flatten(1).all(1)).all(), "a view that hides pixels is tested"
    assert torch.equal(tiles.any(0), (~shown).any(0))


# --- canonical inference


class Loud(nn.Module):
    """Two nearly equal classes whose sums grow with a white pixel, and with them the rounding."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(256, 512), nn.Linear(512, 2, bias=False)
        self.a.weight.data = torch.rand(512, 256, generator=generator)
        weight = torch.rand(1, 512, generator=generator)
        self.b.weight.data = torch.cat([weight, weight + 3e-6 * (torch.rand(1, 512, generator=generator) - 0.5)])

    def forward(self, x):
        loud = 1e-4 + (x.amax((1, 2, 3)) > 0.9999) * 100.0
        return self.b(self.a(x.flatten(1)) * loud[:, None])


@pytest.mark.slow
def test_a_picture_has_one_answer_alone_and_among_others(threads):
    defense = cp.PatchCleanser(Loud().eval(), cp.PatchThreat(2), masks=2, fill=0.0)
    defense.check(pictures(2, (16, 16)) * 0.5)
    x = pictures(60, (16, 16), seed=1)
    x[:, :, ::3, ::3] = 1
    together = defense.certify(x, cp.PatchThreat(2))
    assert (together.margin > 0).any()
    for number in (1, 2):
        threads(number)
        for one, label, margin in zip(x, together.label, together.margin, strict=True):
            alone = defense.certify(one[None], cp.PatchThreat(2))
            assert alone.label == label
            assert torch.equal(alone.margin[0], margin)
            assert defense.predict(one[None]) == label


def networks():
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(1, 7, 3), nn.GELU(), nn.Flatten(), nn.Linear(7 * 36, 33), nn.Tanh(), nn.Linear(33, 5)
    )
    yield "convolution", conv
    yield "linear", nn.Sequential(nn.Flatten(), nn.Linear(64, 257), nn.ReLU(), nn.Linear(257, 11), nn.Softplus())
    yield (
        "cascade",
        Cascade([nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))]),
    )


@pytest.mark.parametrize("number", [1, 2, 3, 31, 32, 33, 100, 512])
def test_rows_keep_their_bits_in_every_batch(number, threads):
    for name, network in networks():
        x = pictures(512)
        expected = canonical_logits(network.eval(), 512, lambda rows, x=x: x[rows])
        for count in (1, 2):
            threads(count)
            order = torch.randperm(512, generator=torch.Generator().manual_seed(number))[:number]
            again = canonical_logits(network, number, lambda rows, x=x, order=order: x[order[rows]])
            assert same_bits(again, expected[order]), name


@pytest.mark.slow
def test_views_of_a_vision_transformer_keep_their_bits_beside_views_of_other_sizes():
    torch.manual_seed(0)
    views = vw.PixelSets(torch.stack([vw.Columns(w).visible(SIZE)[0] for w in (1, 3, 4, 6, 8)]))
    model = ViT(views, 1, 3, SIZE, 2, 24, 2, 2).eval()
    x = pictures(9)
    together = ev.logits(model, views, x)
    for view in range(5):
        alone = torch.cat([ev.logits(model, views, one[None], torch.tensor([view])) for one in x])
        assert same_bits(alone[:, 0], together[:, view])


def test_networks_whose_rows_move_each_other_get_one_row_a_pass():
    class Noisy(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] + 1e-7 * len(x)

    row = pictures(1)
    assert rows_per_pass(Noisy(), row) == 32  # all rows of a pass alike: the number of rows is fixed
    assert not is_position_free(Coupled(), row, 8)
    assert rows_per_pass(Coupled(), row) == 1


SLOW = ("cifar10-double", "imagenette")  # minutes
ZOO = [name for name in zoo() if not name.startswith(SLOW)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_zoo_models_answer_alike_alone_and_among_others(name, threads):
    defense = cp.load(name)
    size, channels = ((28, 28), 1) if name.startswith(("mnist", "fashion")) else ((32, 32), 3)
    x = pictures(4, size, channels)
    threat = cp.SparseThreat(4) if "sparse" in name else cp.PatchThreat(5 if "ibp-2" not in name else 2)
    together = defense.certify(x, threat)
    for number in (1, 2):
        threads(number)
        for position in (0, 3)[:number]:
            alone = defense.certify(x[position : position + 1], threat)
            assert alone.label == together.label[position]
            assert torch.equal(alone.certified, together.certified[position : position + 1])
            if "ibp" not in name:  # bounds are float64 sums of a batch: their last bits may differ
                assert torch.equal(alone.margin[0], together.margin[position])
            else:
                torch.testing.assert_close(alone.margin[0], together.margin[position], rtol=1e-9, atol=1e-9)


def test_answers_do_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(180, 3)).eval()
    x = pictures(6)
    answers = [
        cp.DerandomizedSmoothing(model, vw.Columns(3), batch_size=size).evidence(x).values for size in (None, 1, 7, 512)
    ]
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    defense = cp.DerandomizedSmoothing(model, vw.Columns(3))
    for number in (1, 2, 3, 5, 6):
        parts = torch.cat([defense.evidence(part).values for part in x.split(number)])
        assert torch.equal(parts, answers[0])


# --- weights that were changed


def swap_classes(model):
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.flip(0))
        model[1].bias.copy_(model[1].bias.flip(0))


def swap_data(model):
    model[1].weight.data.copy_(model[1].weight.data.flip(0))  # no version counter sees it
    model[1].bias.data.copy_(model[1].bias.data.flip(0))


@pytest.mark.slow
@pytest.mark.parametrize("change", [swap_classes, swap_data])
def test_a_faster_way_with_old_weights_is_not_asked(change):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    x = pictures(1)
    defense = cp.PatchCleanser(model, cp.PatchThreat(1), masks=2)
    assert defense.select_backend(x, 10, only="onnxruntime") == "onnxruntime"
    before, state = defense.predict(x), ev.weights_digest(model)
    change(model)
    assert ev.weights_digest(model) != state
    assert defense.predict(x) != before
    assert defense.predict(x) == cp.PatchCleanser(model, cp.PatchThreat(1), masks=2).predict(x)


def test_digests_tell_tensors_apart():
    one, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        other.weight.copy_(one.weight)
    assert ev.weights_digest(one) == ev.weights_digest(other)
    with torch.no_grad():
        other.weight.copy_(one.weight[[1, 0, 2]])
    assert ev.weights_digest(one) != ev.weights_digest(other)
    assert ev.weights_digest(one) != ev.weights_digest(one.to(torch.bfloat16))
