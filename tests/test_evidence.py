"""Votes and unsure views by the book; the model check refuses what breaks the theorem and accepts what does not."""

import pytest
import torch
from torch import nn

from certipatch import evidence as ev
from certipatch import model_check
from certipatch import views as vw
from certipatch.defenses import DerandomizedSmoothing, IntervalBounds, PatchCleanser, Undefended
from certipatch.errors import InputError
from certipatch.inference import call_network
from certipatch.models import CropNet, ResNet18, StripNet
from certipatch.threats import PatchThreat
from certipatch.views.render import render

SIZE = (8, 8)
COLUMNS = vw.Columns(3, stride=2)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_the_tolerance_of_a_score_grows_with_the_logits(scale):
    network = nulls(nn.ReLU())
    with torch.no_grad():
        network[-1].weight *= scale
        network[-1].bias *= scale
    tolerance = model_check.check_model(network, COLUMNS, images())
    logits = ev.logits(network, COLUMNS, images())
    spread = (logits - logits.mean(-1, keepdim=True)).abs().max().item()
    assert tolerance.atol >= 1e-6 * max(1.0, 0.5 * spread)
    one_row = torch.cat(
        [ev.logits(network, COLUMNS, images(), torch.tensor([v]), 1) for v in range(logits.shape[1])], 1
    )
    assert ((one_row.softmax(-1) - logits.softmax(-1)).abs() <= tolerance.of(logits.softmax(-1))).all()


def images(dtype=torch.float32):
    return torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(5)).to(dtype)


def nulls(*layers):
    """A small network over NULL-encoded views."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, 2), *layers, nn.Flatten(), nn.Linear(36, 3)).eval()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
def test_votes_with_a_threshold(threshold):
    generator = torch.Generator().manual_seed(0)
    scores = torch.softmax(torch.randn(3, 40, 4, generator=generator), -1)
    scores[0, :3, 0] = torch.tensor([threshold, threshold + 1e-3, threshold - 1e-3])
    tolerance = ev.Tolerance(2e-3, 1e-2)
    votes, unsure = ev.votes(scores, threshold, tolerance)
    for b in range(3):
        for v in range(40):
            values = scores[b, v].tolist()
            assert votes[b, v].tolist() == [s > torch.tensor(threshold).item() for s in values]
            near = [abs(s - threshold) <= 2e-3 + 1e-2 * s for s in values]
            assert unsure[b, v].item() == any(near), (values, threshold)
    assert unsure[0, :3].all()


def test_votes_for_the_top_class():
    scores = torch.tensor([[[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.1, 0.5, 0.4], [0.1, 0.48, 0.42], [0.9, 0.05, 0.05]]])
    votes, unsure = ev.votes(scores, None, ev.Tolerance(0.04, 0.0))
    assert votes.int()[0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert unsure[0].tolist() == [True, True, False, True, False]  # a gap of up to twice the tolerance
    generator = torch.Generator().manual_seed(1)
    many = torch.softmax(torch.randn(5, 50, 4, generator=generator), -1)
    votes, unsure = ev.votes(many, None, ev.Tolerance(1e-2, 1e-2))
    assert torch.equal(votes.int().argmax(-1), many.argmax(-1))
    assert (votes.sum(-1) == 1).all()
    first, second = many.sort(-1, descending=True).values[..., :2].unbind(-1)
    assert torch.equal(unsure, first - second <= 2e-2 + 1e-2 * (first + second))


def test_scores_are_at_least_float32():
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        scores = ev.scores(torch.tensor([[1000.0, 0.0, -1000.0]], dtype=dtype))
        assert scores.dtype == expected
        assert scores.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, 3, 1024])
def test_every_view_of_every_picture_in_order(batch_size):
    seen = []

    class Mean(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.flatten(1)[:, :64].sum(1, keepdim=True).expand(-1, 2)

    pictures = torch.rand(5, 1, *SIZE)
    every = ev.logits(Mean(), COLUMNS, pictures, batch_size=batch_size)
    expected = (pictures * COLUMNS.visible(SIZE)[None]).sum((2, 3))
    torch.testing.assert_close(every[..., 0], expected)
    assert len(set(seen)) == 1  # every pass has one shape, whatever the batch size
    some = ev.logits(Mean(), COLUMNS, pictures, torch.tensor([3, 1]), batch_size)
    torch.testing.assert_close(some[..., 0], expected[:, [3, 1]])


def good():
    torch.manual_seed(0)
    yield "null", nulls(), COLUMNS
    yield "batch norm", nulls(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)), COLUMNS
    yield "layer norm of a view", nulls(nn.GroupNorm(2, 4)), vw.Blocks(3, 2)
    yield "strip", StripNet(COLUMNS, 1, 3, SIZE, (4, 6)).eval(), COLUMNS
    yield "strip blocks", StripNet(vw.Blocks(3, 2), 1, 3, SIZE, (4, 6)).eval(), vw.Blocks(3, 2)
    yield "crop", CropNet(vw.Rows(3), 1, 3, (4, 6), 1).eval(), vw.Rows(3)
    yield "resnet", ResNet18(1, 3, (4, 6), 1).eval(), COLUMNS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_good_models_are_accepted(dtype):
    for name, model, views in good():
        tolerance = model_check.check_model(model.to(dtype), views, images(dtype))
        assert 0 < tolerance.atol < {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2}[dtype], name
        answers = ev.logits(model, views, images(dtype))
        assert answers.shape == (2, views.number(SIZE), 3)


class AllViews(nn.Module):
    encoding = "all-views"

    def __init__(self, before):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.strip = before, StripNet(COLUMNS, 1, 3, SIZE, (4, 6))

    def forward(self, x):
        return self.strip(self.before(x))


class Scale(nn.Module):
    """Dynamic quantisation with one scale for the whole batch."""

    def forward(self, x):
        scale = x.abs().max() / 127
        return (x / scale).round() * scale


class Wide(nn.Module):
    """A strip network whose kernel is wider than its view: reads one column too many."""

    encoding = "all-views"

    def __init__(self):
        super().__init__()
        self.wide = StripNet(vw.Columns(4, stride=2), 1, 3, SIZE, (4, 6))

    def forward(self, x):
        return self.wide(x)


class Broken(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x.flatten(1)[:, :3] * 0 + self.value


class Inpaint(nn.Module):
    """Fills in hidden pixels from the whole picture: an all-views model that looks behind the mask."""

    encoding = "all-views"

    def forward(self, x):
        visible = COLUMNS.visible(SIZE)
        filled = torch.where(visible[None, :, None], x[:, None], x.mean((2, 3), keepdim=True)[:, None])
        return torch.stack([filled.mean((2, 3, 4)), filled.std((2, 3, 4))], -1)


BAD = {
    "BatchNorm in training mode": (lambda: nulls(nn.BatchNorm2d(4)).train(), "training mode"),
    "BatchNorm alone in training mode": (
        lambda: _train(nulls(nn.BatchNorm2d(4)), nn.BatchNorm2d),
        "other pictures|training",
    ),
    "Dropout in training mode": (lambda: nulls(nn.Dropout(0.5)).train(), "training mode"),
    "Dropout alone in training mode": (lambda: _train(nulls(nn.Dropout(0.5)), nn.Dropout), "two answers|training"),
    "standardised pictures": (lambda: AllViews(nn.InstanceNorm2d(1)).eval(), "hidden pixels"),
    "kernel wider than the view": (lambda: Wide().eval(), "hidden pixels"),
    "fill computed from the picture": (Inpaint, "hidden pixels"),
    "one scale per batch": (lambda: nulls(Scale()).eval(), "other pictures"),
    "one scale per batch, all views": (lambda: AllViews(Scale()).eval(), "other pictures|hidden pixels"),
    "NaN": (lambda: Broken(float("nan")), "not finite"),
    "infinity": (lambda: Broken(float("inf")), "not finite"),
}


def _train(model, kind):
    for module in model.modules():
        if isinstance(module, kind):
            module.train()
    return model


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_refused_with_the_reason(name):
    make, reason = BAD[name]
    with pytest.raises(InputError, match=f"model refused.*({reason})"):
        model_check.check_model(make(), COLUMNS, images())
    with pytest.raises(InputError, match="model refused"):
        DerandomizedSmoothing(make(), COLUMNS).predict(images())


def test_the_check_leaves_a_refused_model_as_it_was():
    """In training mode a forward pass would replace the running statistics by those of random pictures."""
    model = nulls(nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError):
        model_check.check_model(model, COLUMNS, images())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_model_that_writes_into_its_input():
    """The caller's pictures are the caller's, whatever the network does."""

    class InPlace(nn.Module):
        def forward(self, x):
            return x.clamp_(0.25, 0.75)

    pictures = images()
    before = pictures.clone()
    DerandomizedSmoothing(AllViews(InPlace()).eval(), COLUMNS).predict(pictures)
    assert torch.equal(pictures, before)


def test_models_of_the_wrong_shape():
    class Shape(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(InputError, match=r"\(N, K\) is needed"):
        ev.logits(Shape(), COLUMNS, images())
    bad = Shape()
    bad.encoding = "all-views"
    with pytest.raises(InputError, match=r"\(B, V=4, K\) is needed"):
        ev.logits(bad, COLUMNS, images())


@pytest.mark.parametrize(
    "pictures",
    [torch.rand(1, 8, 8), torch.zeros(0, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 0, 8, 8),
     torch.zeros(1, 1, 0, 8), torch.full((1, 1, 8, 8), 1.01), torch.full((1, 1, 8, 8), -0.01),
     torch.full((1, 1, 8, 8), torch.nan), torch.full((1, 1, 8, 8), torch.inf), [[0.5]], None],
    ids=lambda p: str(getattr(p, "shape", p)),
)  # fmt: skip
def test_bad_pictures(pictures):
    with pytest.raises(InputError):
        ev.check_images(pictures)
    with pytest.raises(InputError):
        DerandomizedSmoothing(nulls(), COLUMNS).certify(pictures, PatchThreat(2))


def test_pictures_that_the_model_cannot_read():
    """A type or a size that torch refuses is told in one line, with what to do."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    cleanser = PatchCleanser(network, PatchThreat(2), masks=2)
    for defense in (cleanser, IntervalBounds(network), Undefended(network)):
        with pytest.raises(InputError, match=r"in torch.float64: its weights are torch.float32, .*images.to"):
            defense.certify(torch.rand(1, 1, 8, 8).double(), PatchThreat(2))
        with pytest.raises(InputError, match="cannot read pictures of 1x9x9"):
            defense.certify(torch.rand(1, 1, 9, 9), PatchThreat(2))
        with pytest.raises(InputError, match=r"a threat is PatchThreat\(…\) or SparseThreat\(…\), not 5"):
            defense.certify(torch.rand(1, 1, 8, 8), 5)  # type: ignore[arg-type]


def test_running_out_of_memory_is_not_a_matter_of_the_pictures():
    class Full(nn.Module):
        def forward(self, pictures):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        call_network(Full(), torch.rand(1, 1, 8, 8))


def test_one_nan_among_good_pixels_is_named():
    pictures = images()
    pictures[1, 0, 3, 3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        ev.check_images(pictures)
    with pytest.raises(InputError, match="divide by 255"):
        ev.check_images(images() * 255)


class Rounds(nn.Module):
    """Two classes, 500 times as far apart as the picture is bright; odd batches round the first logit up by 0.001."""

    def forward(self, x):
        bright = (x[:, 0] - x[:, 1]).sum((1, 2)) * 500 - 5e-4 + 1e-3 * (len(x) % 2)
        return torch.stack([bright, torch.zeros_like(bright)], 1)


@pytest.mark.parametrize("threshold", [0.5, None])
def test_rounding_is_measured_where_softmax_is_not_saturated(threshold):
    """Confident answers hide how far logits move: at 0.5 the same rounding turns votes, which must then be unsure."""
    views = vw.Columns(8, stride=8)
    tolerance = model_check.check_model(Rounds(), views, torch.full((2, 1, *SIZE), 0.9))
    doubtful = render("null", torch.full((1, 1, *SIZE), 0.5), views, torch.tensor([0]))[0]
    (odd, odd_unsure), (even, even_unsure) = (
        ev.votes(ev.scores(Rounds()(rows))[None], threshold, tolerance)
        for rows in (doubtful, doubtful.expand(2, -1, -1, -1))
    )
    assert not torch.equal(odd[0], even[0])
    assert odd_unsure.all()
    assert even_unsure.all()


def test_what_a_network_says_of_its_input_stays_as_it_says_it():
    class Picky(nn.Module):
        def forward(self, x):
            raise InputError("these are no pictures of cats; give cats")

    with pytest.raises(InputError, match=r"^these are no pictures of cats; give cats$"):
        call_network(Picky(), torch.rand(1, 3, 4, 4))
