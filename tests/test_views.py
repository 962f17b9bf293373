"""Views: the visible pixels are those of a literal definition, and hidden pixels reach nothing."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certipatch import views as vw
from certipatch.views.render import crop, fill, null, render


def starts(length, width, stride, wrap):
    """Literal definition: step by step; without wrap-around the last one is pushed back to the border."""
    found, position = [], 0
    while True:
        if wrap and position >= length:
            return found
        if not wrap and position + width >= length:
            return [*found, length - width]
        found.append(position)
        position += stride


def naive(kind, width, stride, wrap, count, size):
    """Sets of visible pixels, one per view."""
    height, columns = size
    run = lambda start, length: {(start + i) % length for i in range(width)}  # noqa: E731
    across = [run(s, columns) for s in starts(columns, width, stride, wrap)] if kind != "rows" else None
    down = [run(s, height) for s in starts(height, width, stride, wrap)] if kind != "columns" else None
    if kind == "columns":
        singles = [{(i, j) for i in range(height) for j in js} for js in across]
    elif kind == "rows":
        singles = [{(i, j) for i in rows for j in range(columns)} for rows in down]
    else:
        singles = [{(i, j) for i in rows for j in js} for rows in down for js in across]
    return [set().union(*chosen) for chosen in combinations(singles, count)]


def pixel_sets(visible):
    return [set(map(tuple, view.nonzero().tolist())) for view in visible]


KINDS = {"columns": vw.Columns, "rows": vw.Rows, "blocks": vw.Blocks}


@given(
    st.sampled_from(sorted(KINDS)), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(1, 2),
    st.integers(1, 7), st.integers(1, 7),
)  # fmt: skip
def test_visible_pixels(kind, width, stride, wrap, count, height, columns):
    views, size = KINDS[kind](width, stride, wrap, count), (height, columns)
    sides = {"columns": (columns,), "rows": (height,), "blocks": size}[kind]
    if width > min(sides):
        with pytest.raises(ValueError, match="does not fit"):
            views.number(size)
        return
    expected = naive(kind, width, stride, wrap, count, size)
    if not expected:
        with pytest.raises(ValueError, match="views"):
            views.number(size)
        return
    visible = views.visible(size)
    assert views.number(size) == len(expected)
    assert pixel_sets(visible) == expected
    index = torch.arange(len(expected)).flip(0)[::2]
    assert torch.equal(views.visible(size, index), visible[index])
    assert vw.create(views.settings()) == views


def test_without_wrap_around_every_pixel_is_shown_at_any_stride():
    assert vw.Columns(4, stride=3, wrap=False).starts((1, 12)) == [0, 3, 6, 8]
    assert vw.Blocks(3, stride=3, wrap=False).visible((7, 8)).any(0).all()


def test_other_views_and_their_settings():
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, 1:3, 2] = mask[1, 0, 0] = True
    hidden = vw.masked(mask)
    assert torch.equal(hidden.visible((4, 5)), ~mask)
    assert torch.equal(vw.create(hidden.settings()).visible((4, 5)), ~mask)
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        hidden.number((5, 4))
    fields = vw.ReceptiveFields(size=(3, 3), stride=(2, 2), offset=(-1, -1), grid=(3, 2))
    seen = pixel_sets(fields.visible((5, 4)))
    assert seen[0] == {(i, j) for i in (0, 1) for j in (0, 1)}  # cut at the border
    assert seen[5] == {(i, j) for i in (3, 4) for j in (1, 2, 3)}
    assert vw.create(fields.settings()) == fields


@pytest.mark.parametrize(
    "settings",
    [{}, {"name": "circles"}, {"name": "columns"}, {"name": "columns", "width": 0}, {"name": "rows", "width": 2.0},
     {"name": "columns", "width": 2, "angle": 3}, {"name": "blocks", "width": True}, {"name": "rows", "width": 1, "stride": 0},
     {"name": "receptive-fields", "size": [0, 1], "stride": [1, 1], "offset": [0, 0], "grid": [1, 1]}],
)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(ValueError):  # noqa: PT011
        vw.create(settings)


def test_bad_pixel_sets():
    for bad in (torch.ones(2, 3, 3), torch.ones(3, 3).bool(), torch.ones(0, 3, 3).bool()):
        with pytest.raises(ValueError, match="pixel sets"):
            vw.PixelSets(bad)


ENCODINGS = [(e, v) for e in ("null", "fill", "crop") for v in (vw.Columns(3, 2), vw.Rows(2), vw.Blocks(3, 2))]
ENCODINGS += [(e, v) for e in ("null", "fill") for v in (vw.Columns(2, 2, count=2), vw.Blocks(2, 3, False, 2))]


@pytest.mark.parametrize(("encoding", "views"), ENCODINGS)
def test_hidden_pixels_never_reach_the_network(encoding, views):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    visible = views.visible((5, 7))
    every = torch.arange(len(visible))
    clean = render(encoding, images, views, every)
    assert clean.shape[:2] == (2, len(visible))
    for v in every.tolist():
        poisoned = torch.where(visible[v], images, torch.nan)
        before = poisoned.clone()
        shown = render(encoding, poisoned, views, every[v : v + 1])
        assert torch.equal(shown[:, 0], clean[:, v])  # NaN nowhere, and nothing else changed
        assert torch.equal(poisoned.nan_to_num(9), before.nan_to_num(9))
        x = images.clone().requires_grad_()
        weights = torch.rand(clean.shape[2:], dtype=torch.float64) + 1
        (gradient,) = torch.autograd.grad((render(encoding, x, views, every[v : v + 1])[:, 0] * weights).sum(), x)
        assert (gradient[:, :, ~visible[v]] == 0).all()
        if encoding != "null":
            assert (gradient[:, :, visible[v]] != 0).all()


def test_null_is_a_value_that_no_pixel_has():
    images = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3)
    shown = null(images, torch.tensor([[[True, False, True]], [[False, True, True]]]))
    assert shown[0, 0].squeeze(1).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert shown[0, 1].squeeze(1).tolist() == [[0, 0.25, 1], [0, 0.75, 0]]
    assert fill(images, torch.tensor([[[False, True, False]]])).flatten().tolist() == [0.5, 0.25, 0.5]


def test_a_crop_is_the_band_and_its_position():
    images = torch.arange(12.0).view(1, 1, 3, 4) / 12
    band = crop(images, vw.Columns(2), torch.tensor([3]))[0, 0] * 12  # columns 3 and, around the end, 0
    assert band[0].tolist() == [[3, 0], [7, 4], [11, 8]]
    assert (band[1] == 9).all()
    row = crop(images, vw.Rows(2), torch.tensor([1]))[0, 0] * 12  # turned: W x s
    assert row[0].tolist() == [[4, 8], [5, 9], [6, 10], [7, 11]]
    block = crop(images, vw.Blocks(2), torch.tensor([11]))[0, 0] * 12  # the last corner wraps both ways
    assert block[0].tolist() == [[11, 8], [3, 0]]
    assert block.shape == (3, 2, 2)


def test_renderings_that_do_not_exist():
    images = torch.rand(1, 1, 4, 4)
    index = torch.tensor([0])
    with pytest.raises(ValueError, match="unknown encoding"):
        render("blur", images, vw.Columns(2), index)
    with pytest.raises(ValueError, match="null encoding"):
        render("crop", images, vw.Columns(2, count=2), index)
    with pytest.raises(ValueError, match="cropped"):
        render("crop", images, vw.PixelSets(torch.ones(1, 4, 4).bool()), index)
