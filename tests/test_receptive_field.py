"""Receptive fields from layers: held against gradients, the papers' numbers, and networks that must be refused."""

import math

import pytest
import torch
from torch import nn

from certipatch.errors import InputError
from certipatch.models import BagNet, SmallBagNet, receptive_fields
from certipatch.models.layers import Crop, Resize
from certipatch.threats import PatchThreat
from certipatch.views import ReceptiveFields
from certipatch.views.incidence import sees


def settled(network: nn.Module) -> nn.Module:
    """Float64, eval mode, positive weights and no dead units: what a cell can see, it does see."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = 0.1 + torch.rand(tensor.shape, generator=generator)
            if "running_mean" in name:
                tensor.data = -tensor.data
    return network.double().eval()


class Added(nn.Module):
    """A shortcut over a strided convolution, cut to the same cells."""

    def __init__(self, margin=1):
        super().__init__()
        self.body, self.short = nn.Conv2d(2, 3, 3, 2), nn.Sequential(Crop(margin), nn.Conv2d(2, 3, 1, 2))

    def forward(self, x):
        return torch.relu(self.body(x) + self.short(x))


SMALL = {
    "bagnet 9": (BagNet(2, 3, 9, (2, 2, 2, 2), (1, 1, 1, 1)), (40, 43)),
    "bagnet 17": (BagNet(2, 3, 17, (2, 2, 2, 2), (2, 1, 1, 1)), (41, 40)),
    "bagnet 33": (BagNet(2, 3, 33, (2, 2, 2, 2), (1, 1, 1, 1)), (49, 50)),
    "small bagnet 12": (SmallBagNet(2, 3, (16, 18), 12, (2, 3, 4, 5)), (16, 18)),
    "small bagnet 10": (SmallBagNet(2, 3, (15, 14), 10, (2, 3, 4, 5)), (15, 14)),
    "strides and padding": (
        nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), (2, 1), (2, 0), dilation=(2, 1)),
            nn.MaxPool2d(2, 2, 1),
            nn.Conv2d(3, 3, 3, 1, 1, groups=3),
        ),
        (13, 9),
    ),
    "pooling that rounds up": (
        nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 1), nn.Conv2d(2, 1, 1)),
        (10, 9),
    ),
    "shortcut": (nn.Sequential(Added(), nn.Conv2d(3, 2, 2)), (11, 12)),
    "resized": (nn.Sequential(Resize(20), nn.Conv2d(2, 3, 4, 3)), (7, 7)),
    "resized to less": (nn.Sequential(Resize(6), nn.Conv2d(2, 3, 2)), (9, 9)),
}


@pytest.mark.parametrize(("network", "size"), SMALL.values(), ids=SMALL)
def test_against_gradients(network, size):
    views = receptive_fields(settled(network), size)
    part = getattr(network, "local", network)
    images = (0.2 + torch.rand(1, 2, *size, dtype=torch.float64)).requires_grad_()
    cells = part(images)
    assert cells.shape[2:] == views.grid
    visible = views.visible(size)
    filled = []
    for v, cell in enumerate(cells[0].flatten(1).sum(0)):
        (gradient,) = torch.autograd.grad(cell, images, retain_graph=True)
        touched = (gradient != 0).any(1)[0]
        assert not (touched & ~visible[v]).any()
        rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        filled.append(float(box / visible[v].sum()))
    assert max(filled) == 1  # no larger than needed
    assert sum(filled) / len(filled) > 0.5


@pytest.mark.parametrize(("field", "cells"), [(9, 27), (17, 26), (33, 24)])
def test_bagnets_at_224(field, cells):
    """The papers' receptive fields and the stride of 8; 26x26 cells is what PatchGuard works on."""
    network = BagNet(3, 10, field, (4, 4, 4, 4)).eval()
    found = receptive_fields(network, (224, 224))
    assert found == ReceptiveFields((field, field), (8, 8), (0, 0), (cells, cells))
    assert network(torch.rand(1, 3, 224, 224)).shape == (1, cells**2, 10)


def test_the_papers_cifar10():
    """Resized to 192: 22x22 cells, and a patch that reaches further than six times its side."""
    network = BagNet(3, 10, 17, (2, 2, 2, 2), (1, 1, 1, 1), resize=192).eval()
    found = receptive_fields(network, (32, 32))
    assert (found.grid, found.size, found.stride, found.resized) == ((22, 22), (17, 17), (8, 8), (192, 192))
    touched = sees(found, PatchThreat(5), (32, 32)).rows.view(-1, 22, 22)
    assert touched.any(2).sum(1).max() > math.ceil((30 + 17 - 1) / 8)
    picture = torch.rand(1, 3, 32, 32)
    clean = network(picture)[0]
    for location in (0, 100, 783):
        top, left = divmod(location, 28)
        attacked = picture.clone()
        attacked[..., top : top + 5, left : left + 5] = torch.rand(5, 5).round()
        relation = sees(found, PatchThreat(5), (32, 32))
        outside = ~relation.rows[relation.row_of[location]]
        assert (network(attacked)[0] - clean)[outside].abs().max() <= 1e-5
        assert (network(attacked)[0] - clean)[~outside].abs().max() > 0


@pytest.mark.parametrize("patch", [23, 32, 39])
@pytest.mark.parametrize("field", [9, 17, 33])
def test_equation_2(patch, field):
    """At most ⌈(p + r − 1)/s⌉ cells per axis see a patch; the bound is attained."""
    found = receptive_fields(BagNet(3, 10, field, (1, 1, 1, 1), (1, 1, 1, 1)).eval(), (224, 224))
    relation = sees(found, PatchThreat(patch), (224, 224))
    rows = relation.rows.view(-1, *found.grid)
    expected = min(math.ceil((patch + field - 1) / 8), found.grid[0])
    assert rows.any(2).sum(1).max() == rows.any(1).sum(1).max() == expected


def test_local_logits_average_to_the_global_ones():
    network = BagNet(3, 7, 17, (4, 4, 4, 4), (1, 1, 1, 1)).eval()
    images = torch.rand(2, 3, 48, 56)
    features = network.local[:-1](images)
    head = network.local[-1]
    pooled = features.mean((2, 3)) @ head.weight[:, :, 0, 0].T + head.bias
    torch.testing.assert_close(network(images).mean(1), pooled, rtol=1e-4, atol=1e-5)


class Flips(nn.Module):
    def forward(self, x):
        return torch.relu(x.flip(3))


class Pools(nn.Module):
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(3)), "1 (AdaptiveAvgPool2d)"),
        (nn.Sequential(nn.InstanceNorm2d(1)), "InstanceNorm2d"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")), "circular"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same")), "same"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train(), "batch norm 1"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)), "batch norm 0"),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), "ConvTranspose2d"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), Resize(9)), "only pictures"),
        (nn.Sequential(nn.MultiheadAttention(2, 1)), "MultiheadAttention"),
        (Flips(), "flip"),
        (Pools(), "mean"),
        (nn.Sequential(nn.Conv2d(1, 1, 30)), "too small"),
    ],
)
def test_what_is_not_known_is_refused_by_name(network, named):
    if not network.training or named != "batch norm 1":
        network.eval()
    with pytest.raises(InputError) as error:
        receptive_fields(network, (8, 8))
    assert named in str(error.value)
