"""Interval bounds: every layer against brute force, cones against whole passes, sparse bounds against enumeration."""

import itertools
import json
import sys
from fractions import Fraction

import pytest
import torch
import z3
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_parquet, write_recipe
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from certipatch import cli, models
from certipatch.bounds import (
    Interval,
    attacked,
    convolution,
    logit_bounds,
    margin_bounds,
    passage,
    patch_margins,
    patch_verdict,
    regions,
    rivals_of,
    sparse_margins,
)
from certipatch.defenses import IntervalBounds
from certipatch.errors import InputError
from certipatch.testing import check_defense
from certipatch.threats import PatchThreat, SparseThreat

SIZE = (9, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def headed(*layers, channels=2, size=SIZE, classes=3):
    """Layers with a flattening and a linear head behind them, in float64, with batch norms that do something."""
    body = nn.Sequential(*layers).double()
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.3, 2)
            nn.init.normal_(layer.weight)
    body.eval()
    n = body(torch.zeros(1, channels, *size).double()).numel()
    return nn.Sequential(body, nn.Flatten(), nn.Linear(n, classes).double()).eval()


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


LAYERS = {
    "flatten and linear": lambda: (nn.Flatten(), nn.Linear(144, 7), nn.ReLU(), nn.Linear(7, 4)),
    "3x3": lambda: (conv(2, 3, 3, 1, 1), nn.ReLU(), conv(3, 3, 3, 1, 1)),
    "many channels, unequal kernel": lambda: (conv(2, 18, 3, 1, 1), nn.ReLU(), conv(18, 3, (2, 5), 1, (1, 2))),
    "many channels, dilated": lambda: (conv(2, 18, 1), nn.ReLU(), conv(18, 3, 3, 1, (3, 1), (2, 1))),
    "stride, padding, dilation": lambda: (conv(2, 4, (3, 2), (2, 3), (2, 1), (1, 2)), nn.Tanh()),
    "stride larger than the kernel": lambda: (conv(2, 4, 1, 3), nn.ReLU()),
    "groups": lambda: (conv(2, 4, 3, groups=2), nn.Sigmoid(), conv(4, 4, 3, 1, 1, groups=4)),
    "padding same": lambda: (conv(2, 4, (2, 4), padding="same", dilation=(1, 2)), nn.ReLU()),
    "batch norm": lambda: (conv(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)),
    "activations": lambda: (conv(2, 3, 3), nn.ELU(2.0), conv(3, 3, 1), nn.Softplus(), nn.Identity(), nn.Dropout(0.5)),
    "max pool": lambda: (conv(2, 3, 3), nn.MaxPool2d(2)),
    "max pool, every option": lambda: (conv(2, 3, 1), nn.MaxPool2d((3, 2), (2, 3), (1, 1), (1, 2), ceil_mode=True)),
    "average pool": lambda: (conv(2, 3, 3), nn.ReLU6(), nn.AvgPool2d(2)),
    "average pool, ceil": lambda: (conv(2, 3, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "average pool, without padding": lambda: (nn.AvgPool2d((2, 3), (2, 2), (1, 1), True, False), conv(2, 3, 2)),
    "average pool, divisor": lambda: (conv(2, 3, 1), nn.AvgPool2d(3, 2, 1, divisor_override=4)),
    "pooling that skips": lambda: (conv(2, 3, 1), nn.MaxPool2d(1, 3), nn.AvgPool2d(1, 2)),
    "linear along rows": lambda: (nn.Linear(8, 5), nn.ReLU(), conv(2, 3, 3)),
    "global average": lambda: (conv(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
}


class Residual(nn.Module):
    """Normalization, residual addition, concatenation, mean over axes, by functions and methods."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([0.5, 0.4])[:, None, None])
        self.one, self.two = conv(2, 4, 3, 1, 1), conv(4, 4, 3, 1, 1)
        self.three, self.head = conv(4, 4, 3, 2, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.one((x - self.shift) / 0.25))
        x = F.relu6(x + self.two(x))
        y = F.max_pool2d(torch.tanh(x), 3, 2, padding=1)
        z = torch.cat([y, self.three(x) + y * 0.5], 1)
        return self.head(z.mean((2, 3)))


class Viewed(nn.Module):
    """Functions, and a flattening by ``view``."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = conv(2, 3, 3), nn.Linear(168, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = F.avg_pool2d(self.conv(x), 2, stride=1, padding=1).relu()
        x = F.dropout(x.view(x.size(0), -1), 0.3, training=False)
        return self.head(F.leaky_relu(self.fc(x), 0.1))


class Twice(nn.Module):
    """Constants on either side, signs, and a flattened map that two layers read behind a dropout."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([0.5, 0.4])[:, None, None])
        self.conv, self.drop = conv(2, 3, 3), nn.Dropout(0.3)
        self.one, self.two, self.head = nn.Linear(126, 5), nn.Linear(126, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = -self.conv(self.shift + 0.5 * (1.5 - x).mul(2.0).sub(self.shift)).relu()
        x = self.drop(x.view(-1, 126))
        return self.head(torch.relu(self.one(x)) + torch.relu(self.two(x)))


class Spread(nn.Module):
    """A pooled map that is spread over the map that it is added to."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.pool, self.after, self.head = conv(2, 3, 3, 1, 1), pool, conv(3, 2, 3), nn.Linear(84, 3)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.head(torch.flatten(F.relu(self.after(x + self.pool(x))), 1))


class Wide(nn.Module):
    """A layer of the pixels beside a deeper network, both added up and divided, as a temperature does."""

    def __init__(self):
        super().__init__()
        self.shallow, self.one, self.two = nn.Linear(144, 3), nn.Linear(144, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.flatten(x, 1)
        return (self.shallow(x) + self.two(torch.relu(self.one(x)))) / 3 + 0.25


def nets():
    torch.manual_seed(0)
    found = {name: headed(*layers()) for name, layers in LAYERS.items()}
    found["residual, concatenation"] = Residual().double().eval()
    for name, pool in {"maximum": nn.MaxPool2d(SIZE), "mean": nn.AvgPool2d(SIZE), "rows": nn.MaxPool2d((1, 8))}.items():
        found[f"{name} spread over the map"] = Spread(pool).double().eval()
    found["view and functions"] = Viewed().double().eval()
    found["read twice, constants on the left"] = Twice().double().eval()
    for depth in (2, 4):
        found[f"cnn {depth}"] = created(name="cnn", depth=depth).double()
    found["mlp"] = created(name="mlp", widths=(9,)).double()
    found["pixels beside a network"] = Wide().double().eval()
    members = ({"name": "cnn", "depth": 2}, {"name": "mlp", "widths": (9,)}, {"name": "mlp", "widths": (4, 5)})
    found["ensemble"] = created(name="ensemble", members=members).double()
    return found


def created(channels=2, classes=3, size=SIZE, **settings):
    return models.NETWORKS[settings["name"]](**settings).build(None, channels, classes, size).eval()


def pictures(number=2, channels=2, size=SIZE, seed=0):
    return torch.rand(number, channels, *size, generator=generator(seed), dtype=torch.float64)


def random_box(like, seed):
    """A box within [0, 1] around random pictures: points, intervals, and pixels that are free."""
    ends = torch.rand(2, *like.shape, generator=generator(seed), dtype=torch.float64).sort(0).values
    kind = torch.randint(3, like.shape, generator=generator(seed + 1))
    lower = torch.where(kind == 0, like, torch.where(kind == 1, ends[0], 0.0))
    return Interval(lower, torch.where(kind == 0, like, torch.where(kind == 1, ends[1], 1.0)))


def samples_of(box, number, seed):
    """Pictures of a box: corners and others, (number, C, H, W)."""
    share = torch.rand(number, *box.shape[1:], generator=generator(seed), dtype=torch.float64)
    share[: number // 2] = share[: number // 2].round()
    return box.lower + share * (box.upper - box.lower)


NETS = nets()


@pytest.mark.parametrize("name", NETS)
def test_no_picture_leaves_the_bounds(name):
    net = NETS[name]
    for seed in range(3):
        box = random_box(pictures(1, seed=seed), seed)
        found = logit_bounds(net, box, outward=True)
        answers = net(samples_of(box, 60, seed))
        assert (answers >= found.lower).all()
        assert (answers <= found.upper).all()
        label = answers[:1].argmax(1)
        margin = margin_bounds(net, box, label, outward=True)
        assert (answers[:, label] - answers[:, rivals_of(label, 3)[0]] >= margin).all()
        assert (margin >= (found.lower[:, label] - found.upper[:, rivals_of(label, 3)[0]]) - 1e-9).all()


@pytest.mark.parametrize("name", NETS)
def test_a_point_has_the_network_s_own_logits(name):
    net, x = NETS[name], pictures(3)
    found = logit_bounds(net, Interval(x, x))
    assert torch.allclose(found.lower, net(x), 0, 1e-12)
    assert torch.equal(found.lower, found.upper)
    outward = logit_bounds(net, Interval(x, x), outward=True)
    assert (outward.lower < found.lower).all()
    assert (outward.upper > found.upper).all()
    assert (outward.upper - outward.lower < 1e-7).all()  # Softplus of torch falls by 2e-9 at its threshold


THREATS = [
    PatchThreat(2),
    PatchThreat(7),
    PatchThreat((1, 4)),
    PatchThreat(5, shape="diamond"),
    PatchThreat(5, shape="line"),
    PatchThreat(2, count=2, where="corners"),
    PatchThreat(3, where=[(0, 0), (6, 5), (2, 3)]),
]


def whole(net, images, label, found, outward=False, strength=1.0):
    """Margins of all places by whole passes."""
    places = torch.arange(len(found)).expand(len(images), -1)
    box = attacked(images, found, places, strength)
    margin = margin_bounds(net, box, label.repeat_interleave(len(found)), outward)
    return margin.unflatten(0, places.shape)


@pytest.fixture
def without_matrices(monkeypatch):
    """Convolutions of windows slide, however small they are."""
    return lambda slide: monkeypatch.setattr(convolution, "SMALL_MATRIX", 0 if slide else 2**17)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_cones_are_whole_passes(name, without_matrices):
    net, x, y = NETS[name], pictures(), torch.tensor([2, 0])
    before = x.clone()
    with torch.no_grad():
        for number, threat in enumerate(THREATS):
            without_matrices(number % 3 == 0)
            found, outward = regions(threat, SIZE), number % 2 == 1
            margin = patch_margins(net, x, y, found, outward=outward)
            expected = whole(net, x, y, found, outward)
            assert margin.shape == (2, len(found), 2)
            assert (margin - expected).abs().max() < 1e-9
            limit = margin.flatten(1).amin(1) + torch.tensor([1e-6, -1e-6])
            assert patch_verdict(net, x, y, found, limit, outward=outward).tolist() == [False, True]
    assert torch.equal(x, before)


def test_parts_of_the_pictures_and_of_the_places():
    net, x, y = NETS["3x3"], pictures(5), torch.tensor([2, 0, 1, 1, 0])
    found = regions(PatchThreat(3), SIZE)
    margin = patch_margins(net, x, y, found)
    assert torch.allclose(patch_margins(net, x, y, found, memory=1), margin, 0, 1e-12)
    assert torch.allclose(patch_margins(net, x, y, found, index=[4, 0, 11]), margin[:, [4, 0, 11]], 0, 1e-12)
    limit = margin.flatten(1).amin(1).median().expand(5)
    verdict = patch_verdict(net, x, y, found, limit, memory=1)
    assert torch.equal(verdict, (margin > limit[:, None, None]).flatten(1).all(1))
    assert sorted(verdict.tolist()) == [False, False, False, True, True]
    half = patch_margins(net, x, y, found, strength=0.5)
    assert torch.allclose(half, whole(net, x, y, found, strength=0.5), 0, 1e-9)
    assert (half >= margin).all()
    with torch.no_grad():
        clean = patch_margins(net, x, y, found, strength=0.0)[:, 0]
        logits = net(x)
    assert torch.allclose(clean, logits.gather(1, y[:, None]) - logits.gather(1, rivals_of(y, 3)), 0, 1e-9)


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from(["square", "line", "parallelogram"]),
)
def test_random_networks(seed, kernel, stride, dilation, padding, shape):  # all small: convolutions are matrices
    """Patched pictures never leave the bounds, and cones are whole passes."""
    torch.manual_seed(seed)
    net = headed(
        conv(2, 3, (kernel, min(3, kernel + 1)), stride, padding, (dilation, 1)),
        nn.ReLU(),
        nn.MaxPool2d(2, 1, 1),
        conv(3, 20, 2, 1, 1),
        nn.ReLU(),
        conv(20, 2, 2, 1, 1),
    )
    found, x, y = regions(PatchThreat(4, shape=shape), SIZE), pictures(2, seed=seed), torch.tensor([0, 1])
    with torch.no_grad():
        margin = patch_margins(net, x, y, found, outward=True)
        assert (margin - whole(net, x, y, found, True)).abs().max() < 1e-9
        for place in range(0, len(found), 7):
            values = torch.rand(40, 1, 2, *SIZE, generator=generator(place), dtype=torch.float64)
            values[:20] = values[:20].round()
            answer = net(torch.where(found.pixels(place), values, x).flatten(0, 1)).unflatten(0, (40, 2))
            for b in range(2):
                true = answer[:, b, y[b], None] - answer[:, b, rivals_of(y, 3)[b]]
                assert (true >= margin[b, place]).all()


def corners(x, pixels):
    """Every black-and-white pattern on some pixels of one picture (C, H, W)."""
    number = len(pixels) * len(x)
    values = (torch.arange(2**number)[:, None] >> torch.arange(number) & 1).to(x)
    found = x.flatten(1).repeat(len(values), 1, 1)
    found[:, :, pixels] = values.view(-1, len(x), len(pixels))
    return found.view(-1, *x.shape)


def worst(net, x, y, pixels):
    """Smallest margins over ``corners``: the exact worst case of a network that is monotone in every pixel."""
    answers = net(corners(x, pixels))
    return (answers[:, y, None] - answers[:, rivals_of(y[None], answers.shape[1])[0]]).amin(0)


def test_linear_networks_have_exact_bounds():
    torch.manual_seed(1)
    for net in (
        nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).double(),
        nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 4)).double().eval(),
    ):
        x, y = pictures(2, size=(3, 3)), torch.tensor([3, 1])
        found = regions(PatchThreat(2), (3, 3))
        with torch.no_grad():
            margin = patch_margins(net, x, y, found)
            for b, place in itertools.product(range(2), range(len(found))):
                pixels = found.pixels(place).flatten().nonzero().flatten().tolist()
                assert torch.allclose(margin[b, place], worst(net, x[b], y[b], pixels), 0, 1e-12)


def test_one_layer_of_relu_has_exact_bounds_where_it_is_monotone():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    for layer in (net[1], net[3]):
        layer.weight.data.abs_()
    net[3].weight.data[1] = 0
    x, y, found = pictures(1, 1, (3, 3)), torch.tensor([0]), regions(PatchThreat(2), (3, 3))
    with torch.no_grad():
        margin = patch_margins(net, x, y, found)
        exact = [worst(net, x[0], y[0], found.pixels(i).flatten().nonzero().flatten().tolist()) for i in range(4)]
    assert torch.allclose(margin[0], torch.stack(exact), 0, 1e-12)


def exactly(net, x):
    """Logits of a network of linear layers and ReLU, in rational numbers."""
    values = [Fraction(value) for value in x.flatten().tolist()]
    for layer in net:
        if isinstance(layer, nn.Linear):
            rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            values = [sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b)) for row, b in rows]
        elif isinstance(layer, nn.ReLU):
            values = [max(value, Fraction(0)) for value in values]
    return values


def test_outward_bounds_hold_for_the_real_numbers():
    """Where sums cancel, float64 errs; bounds that are rounded outward do not, by windows neither."""
    erred = 0
    for seed in range(8):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).double().requires_grad_(False)
        net[1].weight[:, 1:] *= 1e9
        x, y, found = pictures(1, 1, (4, 4), seed), torch.tensor([seed % 3]), regions(PatchThreat(2), (4, 4))
        net[1].bias.copy_(-(net[1].weight @ x.flatten()) + torch.randn(6, dtype=torch.float64))
        true = exactly(net, x)
        margins = [true[y] - true[int(k)] for k in rivals_of(y, 3)[0]]
        for outward in (True, False):
            bounds = patch_margins(net, x, y, found, strength=0.0, outward=outward)[0].tolist()
            bounds += [margin_bounds(net, Interval(x, x), y, outward)[0].tolist()]
            over = sum(Fraction(b) > m for row in bounds for b, m in zip(row, margins, strict=True))
            erred += over * (not outward)
            assert not (outward and over)
    assert erred > 0  # the test has teeth


def apart(net, scale, shift):
    """The network with its logits scaled and shifted behind it."""

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) * scale + shift

    return Moved().eval()


def test_networks_that_answer_together_are_one_wide_network():
    """Their margins are those of the network whose hidden layer holds both of theirs."""
    torch.manual_seed(1)
    one, two = (created(name="mlp", widths=(n,)).double().requires_grad_(False) for n in (5, 7))
    wide = created(name="mlp", widths=(12,)).double().requires_grad_(False)
    for layer in (1,):
        wide.body[layer].weight.copy_(torch.cat([one.body[layer].weight, two.body[layer].weight]))
        wide.body[layer].bias.copy_(torch.cat([one.body[layer].bias, two.body[layer].bias]))
    wide.head.weight.copy_(torch.cat([one.head.weight, two.head.weight], 1) / 2)
    wide.head.bias.copy_((one.head.bias + two.head.bias) / 2)
    both = models.ensemble.Ensemble([one, two]).eval()
    x, y = pictures(3), torch.tensor([0, 2, 1])
    found = regions(PatchThreat(3), SIZE)
    for outward in (False, True):
        expected = patch_margins(wide, x, y, found, outward=outward)
        assert torch.allclose(patch_margins(both, x, y, found, outward=outward), expected, 0, 1e-9)
        moved = patch_margins(apart(wide, -2.0, 0.5), x, y, found, outward=outward)
        assert torch.allclose(patch_margins(apart(both, -2.0, 0.5), x, y, found, outward=outward), moved, 0, 1e-9)
        expected = sparse_margins(wide, x, y, 2, outward=outward)
        assert torch.allclose(sparse_margins(both, x, y, 2, outward=outward), expected, 0, 1e-9)
    halves = [patch_margins(net, x, y, found) / 2 for net in (one, two)]
    assert (patch_margins(both, x, y, found) >= halves[0] + halves[1] - 1e-9).all()


def test_biases_that_cancel_round_as_large_as_they_are():
    """0.1·(W x + b) + c for large b and c: outward bounds hold for the real numbers, others do not always."""
    erred = 0
    for seed in range(24):
        torch.manual_seed(seed)
        parts = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double() for _ in range(3)]
        for sign, part in zip((1, -1, 0), parts, strict=True):
            part.requires_grad_(False)[3].bias.add_(sign * torch.randn(3, generator=generator(9)) * 1e12)
        net, x, y = models.ensemble.Ensemble(parts).eval(), pictures(1, 1, (2, 2), seed), torch.tensor([seed % 3])
        each = [exactly(part, x) for part in parts]
        true = [sum(logits) / 3 for logits in zip(*each, strict=True)]
        margins = [true[y] - true[int(k)] for k in rivals_of(y, 3)[0]]
        for outward in (True, False):
            bounds = margin_bounds(net, Interval(x, x), y, outward)[0].tolist()
            over = sum(Fraction(b) > m for b, m in zip(bounds, margins, strict=True))
            erred += over * (not outward)
            assert not (outward and over)
    assert erred > 0  # the test has teeth


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("channels", [1, 2])
def test_sparse_bounds_of_linear_networks_are_exact(k, channels):
    """Against every choice of k pixels, all channels of each together."""
    torch.manual_seed(3)
    size = (2, 3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6 * channels, 3)).double()
    x, y = pictures(2, channels, size), torch.tensor([1, 2])
    with torch.no_grad():
        margin = sparse_margins(net, x, y, k)
        for b in range(2):
            every = [worst(net, x[b], y[b], list(pixels)) for pixels in itertools.combinations(range(6), k)]
            assert torch.allclose(margin[b], torch.stack(every).amin(0), 0, 1e-12)


@pytest.mark.parametrize("name", ["3x3", "groups", "stride, padding, dilation", "mlp", "batch norm", "max pool",
                                  "residual, concatenation", "padding same", "pooling that skips",
                                  "average pool, without padding", "ensemble",
                                  "pixels beside a network"])  # fmt: skip
def test_no_sparse_attack_leaves_the_bounds(name):
    net, x, y = NETS[name], pictures(2), torch.tensor([0, 1])
    with torch.no_grad():
        previous = None
        for k in (1, 3, 72):
            margin = sparse_margins(net, x, y, k, outward=True)
            assert torch.allclose(margin, sparse_margins(net, x, y, k, memory=1), 0, 1e-9)
            hidden = torch.rand(60, 72, generator=generator(k)).argsort(1) < k
            values = torch.rand(60, 1, 2, *SIZE, generator=generator(k + 1), dtype=torch.float64).round()
            answer = net(torch.where(hidden.view(60, 1, 1, *SIZE), values, x).flatten(0, 1)).unflatten(0, (60, 2))
            for b in range(2):
                assert (answer[:, b, y[b], None] - answer[:, b, rivals_of(y, 3)[b]] >= margin[b]).all()
            assert previous is None or (margin <= previous + 1e-9).all()
            previous = margin
        box = Interval(torch.zeros_like(x), torch.ones_like(x))
        assert torch.allclose(previous, margin_bounds(net, box, y), 0, 1e-9)


def test_z3_one_layer():
    """Over the reals: for |x − c| ≤ r, relu(w·x + b) lies within relu(w·c + b ± |w|·r)."""
    x, c, r, w = ([z3.Real(f"{name}{i}") for i in range(2)] for name in "xcrw")
    b = z3.Real("b")
    solver = z3.Solver()
    solver.set("timeout", 20_000)
    for i in range(2):
        solver.add(x[i] - c[i] <= r[i], c[i] - x[i] <= r[i])

    def relu(value):
        return z3.If(value > 0, value, 0)

    def size(value):
        return z3.If(value > 0, value, -value)

    centre, radius = (
        sum(p * q for p, q in zip(w, c, strict=True)) + b,
        sum(size(p) * q for p, q in zip(w, r, strict=True)),
    )
    value = relu(sum(p * q for p, q in zip(w, x, strict=True)) + b)
    solver.add(z3.Or(value > relu(centre + radius), value < relu(centre - radius)))
    assert solver.check() == z3.unsat


# What is refused -------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Runs a function behind a convolution."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv, self.head = function, conv(2, 3, 3), nn.Linear(126, 3)

    def forward(self, x):
        return self.head(torch.flatten(self.function(self.conv(x)), 1))


class Scaled(nn.Module):
    """A constant that is computed."""

    def __init__(self):
        super().__init__()
        self.gamma, self.head = nn.Parameter(torch.ones(1)), nn.Linear(144, 3)

    def forward(self, x):
        return self.head(torch.flatten(x * (1 + self.gamma), 1))


def added_to(x):
    kept = x
    x += x.relu()
    return kept * 1.0


def overwritten(x):
    y = F.relu(x, inplace=True)
    return x + y


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (lambda: headed(nn.Softmax2d()), "Softmax2d"),
        (lambda: headed(conv(2, 2, 3), nn.GELU()), "GELU"),
        (lambda: headed(nn.SiLU()), "SiLU"),
        (lambda: headed(nn.LeakyReLU(-0.1)), "LeakyReLU.*not monotone"),
        (lambda: headed(conv(2, 2, 3, padding=1, padding_mode="circular")), "circular"),
        (lambda: headed(nn.AdaptiveAvgPool2d(2)), "AdaptiveAvgPool2d.*not to 1"),
        (lambda: Calls(F.gelu), "gelu"),
        (lambda: Calls(torch.sin), "sin"),
        (lambda: Calls(lambda x: x * x), "mul"),
        (lambda: Calls(lambda x: x.abs()), "abs"),
        (lambda: Calls(lambda x: x / 0), "divides by 0"),
        (lambda: Calls(lambda x: x.transpose(2, 3)), "transpose"),
        (lambda: Calls(overwritten), "overwrites"),
        (lambda: Calls(added_to), "iadd.*overwrites"),
        (Scaled, "add: of constants alone"),
        (lambda: Calls(lambda x: x.view(-1, 63)), "126 values of a picture are no row of 63"),
        (lambda: Calls(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
        (lambda: Calls(lambda x: x + torch.ones(7, 6)), "cannot be traced|add"),
        (lambda: headed(nn.BatchNorm2d(2)).train(), "BatchNorm2d.*eval"),
        (lambda: headed(nn.Dropout(0.5)).train(), "Dropout.*eval"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 3)), "9x8|2x9x8"),
        (lambda: nn.Sequential(conv(2, 3, 3)), "logits"),
    ],
)
def test_what_has_no_bounds_is_named(net, name):
    with pytest.raises(InputError, match=name):
        passage(net().double(), (2, *SIZE))


# Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outward", [False, True])
@pytest.mark.parametrize("name", ["3x3", "many channels, dilated", "mlp", "cnn 2", "batch norm"])
def test_gradients_are_those_of_whole_passes(name, outward, without_matrices):
    without_matrices(outward)
    net, x, y = NETS[name], pictures(), torch.tensor([0, 1])
    found = regions(PatchThreat(3), SIZE)
    parameters = list(net.parameters())
    own = torch.autograd.grad(patch_margins(net, x, y, found, outward=outward).sum(), parameters)
    other = torch.autograd.grad(whole(net, x, y, found).sum(), parameters)
    assert any(bool(gradient.abs().max() > 0) for gradient in own)
    for one, two in zip(own, other, strict=True):
        assert torch.allclose(one, two, 1e-6, 1e-6)
    sparse = torch.autograd.grad(sparse_margins(net, x, y, 2).sum(), parameters, allow_unused=True)
    assert any(gradient is not None and bool(gradient.abs().max() > 0) for gradient in sparse)


# The defense -----------------------------------------------------------------------------------------------------


def robust():
    """A float32 network that looks at averages, so that small patches do little."""
    torch.manual_seed(0)
    net = created(name="cnn", depth=2, widths=(4, 6, 12))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.mul_(0.3)
    net.head.bias.data.copy_(torch.tensor([0.0, 0.05, 0.0]))
    return net.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [PatchThreat(2), PatchThreat(4, shape="line"), SparseThreat(2),
                                    PatchThreat(1, count=2, where=[(0, 0), (3, 4)])], ids=str)  # fmt: skip
def test_no_attack_breaks_a_certificate(threat):
    report = check_defense(IntervalBounds(robust()), pictures(3).float(), threat, trials=4, slack=1e-6)
    assert report.attacked > 0


def test_the_margin_is_the_bound_less_twice_the_tolerance():
    net, x = robust(), pictures(3).float()
    defense = IntervalBounds(net)
    cert = defense.certify(x, PatchThreat(3))
    assert cert.margin.shape == (3, 7 * 6)
    assert cert.sees is not None
    assert cert.map(0).shape == SIZE
    exact = whole(net.double(), x.double(), cert.label, regions(PatchThreat(3), SIZE)).amin(2)
    gap = exact - cert.margin
    assert (gap > 2e-6).all()  # float32 is never trusted further than its floor
    assert (gap < 1e-3).all()
    assert IntervalBounds(robust()).certify(x, SparseThreat(2)).margin.shape == (3, 1)


def test_a_bound_of_exactly_zero_is_not_certified():
    net = nn.Sequential(nn.Flatten(), nn.Linear(72 * 2, 2)).eval()
    net[1].weight.data.zero_()
    net[1].bias.data.zero_()
    for dtype in (torch.float32, torch.float64):
        cert = IntervalBounds(net.to(dtype)).certify(pictures().to(dtype), PatchThreat(2))
        assert (cert.margin <= 0).all()
        assert not cert.certified.any()
        assert IntervalBounds(net).largest_patch(IntervalBounds(net).evidence(pictures().to(dtype))).tolist() == [0, 0]


def hooked(which):
    """A layer that is not what its weights say, where tracing cannot see it; or the whole network."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    which(net).register_forward_hook(lambda layer, inputs, answer: answer.clamp(max=6))
    return net


def replaced():
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    own = net[1].forward
    net[1].forward = lambda x: own(x).clamp(max=6)
    return net


class Sly(nn.Module):
    """Another network where it is served."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(144, 3)

    def forward(self, x):
        return self.head(x.flatten(1)) * (1.5 if torch.is_inference_mode_enabled() else 1.0)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (lambda: robust().train(), "training mode"),
        (lambda: headed(conv(2, 2, 3), nn.GELU()), "GELU"),
        (lambda: models.ResNet18(2, 3, (4, 4), 1).eval(), "views"),
        (lambda: Sly().eval(), "differ from those of its layers"),
        (lambda: hooked(lambda net: net[1]), r"layer 1 \(Linear\): it has a hook"),
        (lambda: hooked(lambda net: net), r"layer network \(Sequential\): it has a hook"),
        (replaced, r"layer 1 \(Linear\): its forward was replaced"),
    ],
)
def test_models_that_break_the_theorem_are_refused(net, reason):
    with pytest.raises(InputError, match=reason):
        IntervalBounds(net()).check(pictures().float())


def test_what_only_makes_weights_anew_is_read():
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    prune.random_unstructured(net[1], "weight", 0.5)
    x = pictures().float()
    cert = IntervalBounds(net).certify(x, PatchThreat(2))
    net[1].weight_orig.data.mul_(2)  # seen by the next pass, and by the bounds
    assert torch.allclose(IntervalBounds(net).certify(x, PatchThreat(2)).margin, 2 * cert.margin, atol=0.2)
    prune.remove(net[1], "weight")
    assert IntervalBounds(torch.fx.symbolic_trace(net)).certify(x, PatchThreat(2)).margin.shape == cert.margin.shape


class Detector(nn.Module):
    """Its unit sees one 3x3 pattern alone, and adds ``big`` to both logits: served, their small difference rounds away."""

    PATTERN = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])

    def __init__(self, big):
        super().__init__()
        self.first, self.head = nn.Linear(16, 1), nn.Linear(1, 2)
        weight = 2 * self.PATTERN - 1
        weight[3], weight[:, 3] = 0, 0
        self.first.weight.data, self.first.bias.data = weight.view(1, -1), torch.tensor([-4.5])
        self.head.weight.data, self.head.bias.data = torch.full((2, 1), big), torch.tensor([0.0, 0.01])

    def forward(self, x):
        return self.head(torch.relu(self.first(x.flatten(1))))


@pytest.mark.parametrize(("big", "dtype"), [(1e6, torch.float32), (1e2, torch.bfloat16), (6e4, torch.float16)])
def test_large_numbers_that_cancel_in_the_bounds_round_where_the_network_is_served(big, dtype):
    net, x = Detector(big).eval().to(dtype), torch.zeros(1, 1, 4, 4, dtype=dtype)
    cert = IntervalBounds(net).certify(x, PatchThreat(3))
    assert cert.label.tolist() == [1]
    assert net(Detector.PATTERN[None, None].to(dtype)).argmax(1).tolist() == [0]  # an attack
    assert not cert.certified.any()
    assert IntervalBounds(Detector(1.0).eval().double()).certify(x.double(), PatchThreat(3)).certified.all()


def test_changed_weights_are_measured_anew():
    net, x = robust(), pictures(3).float()
    defense = IntervalBounds(net)
    defense.certify(x, PatchThreat(2))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(300)
    assert torch.equal(defense.certify(x, PatchThreat(2)).margin, IntervalBounds(net).certify(x, PatchThreat(2)).margin)
    assert defense.tolerance(x) == IntervalBounds(net).tolerance(x)


class Weighted(nn.Module):
    """A constant that makes three channels of one, or what a picture is joined with."""

    def __init__(self, join):
        super().__init__()
        self.register_buffer("weights", torch.tensor([1.0, 2.0, -1.0]).view(1, 3, 1, 1))
        self.join, self.head = join, nn.Linear(3 * 72, 3)

    def forward(self, x):
        return self.head(torch.flatten(x + x.mean((2, 3)) if self.join else x * self.weights, 1))


@pytest.mark.parametrize("join", [False, True])
def test_maps_that_change_their_shape_unseen_are_refused(join):
    reason = "joins maps and vectors" if join else "makes maps of 3x9x8 from 1x9x8"
    with pytest.raises(InputError, match=reason):
        IntervalBounds(Weighted(join).eval()).certify(pictures(1, 1).float(), SparseThreat(1))


# From the command line -------------------------------------------------------------------------------------------


def main(arguments):
    """Exit code of a command."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["certipatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code or 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    recipe = write_recipe(folder / "r.yaml", views=None, objective={}, defense="interval-bounds", name="own",
                          model={"name": "mlp", "widths": [12]}, weight_decay=3.0, epochs=6)  # fmt: skip
    assert main(["train", recipe, "--data", folder / "stripes", "--out", folder / "own"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("threat", [("--patch", 1), ("--sparse", 1)])
def test_evaluate_report_and_certify(home, tmp_path, capsys, threat):
    run = ["evaluate", "--defense", home / "own", "--data", home / "stripes", "--out", tmp_path / "run", *threat]
    assert main(run) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["certified_accuracy"] <= summary["clean_accuracy"] <= 1
    assert summary["certified_by_patch"]["1"] <= summary["clean_accuracy"]
    before = (tmp_path / "run" / "report.html").read_bytes()
    assert main(run) == 0
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", tmp_path / "run"]) == 0
    assert len((tmp_path / "run" / "report.html").read_bytes()) == len(before)


def test_certify_names_the_weakest_place(home, tmp_path, capsys):
    from support import stripes

    (tmp_path / "one.png").write_bytes(stripes(1, 5)[0][0])
    capsys.readouterr()
    assert main(["certify", tmp_path / "one.png", "--defense", home / "own", "--patch", "2", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["weakest"].keys() == {"top", "left", "height", "width"}
    assert result["certified"] == (result["largest_patch"] >= 2)


def test_views_are_refused(home, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", defense="interval-bounds")
    assert main(["train", recipe, "--data", home / "stripes", "--out", tmp_path / "m"]) == 2
    assert "interval-bounds reads whole pictures" in capsys.readouterr().err
