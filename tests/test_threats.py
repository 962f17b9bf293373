"""What the attacker may do: exact pixel sets, every location, and errors that name what is wrong."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certipatch.errors import InputError
from certipatch.threats import PatchThreat, SparseThreat, parse_patch, parse_where, threat_from_dict


def drawn(text):
    return [tuple(tuple(p == "#" for p in row) for row in shape.split()) for shape in text.split("|")]


SHAPES = {
    ("square", 4): "## ##",
    ("square", 16): "#### #### #### ####",
    ("square", 25): "##### ##### ##### ##### #####",
    ("line", 4): "#### | # # # #",
    ("line", 16): "################ |" + " # " * 16,
    ("line", 25): "######################### |" + " # " * 25,
    ("diamond", 4): ".#. ###",
    ("diamond", 16): "..#.. .###. .###. ##### .###. ..#..",
    ("diamond", 25): "...#... ..###.. .#####. ####### .#####. ..###.. ...#...",
    ("parallelogram", 4): "##. .##",
    ("parallelogram", 16): "####... .####.. ..####. ...####",
    ("parallelogram", 25): "#####.... .#####... ..#####.. ...#####. ....#####",
    ("rectangle", 16): "|".join(("#" * w + " ") * h for h, w in ((2, 8), (3, 6), (6, 3), (8, 2))),
    ("rectangle", 25): "|".join(("#" * w + " ") * h for h, w in ((2, 13), (3, 9), (4, 7), (7, 4), (9, 3), (13, 2))),
}


@pytest.mark.parametrize(("shape", "pixels"), SHAPES)
def test_shapes_as_drawn(shape, pixels):
    assert list(PatchThreat(pixels, shape=shape).masks((40, 40))) == drawn(SHAPES[shape, pixels])


@pytest.mark.parametrize("size", [10**9, (1, 10**9), 2**14 + 1])
def test_a_side_that_would_fill_the_memory_is_refused(size):
    with pytest.raises(InputError, match=r"larger than any picture; at most 16384"):
        PatchThreat(size)


def test_four_pixels_make_no_rectangle():
    with pytest.raises(InputError, match="no rectangle of 4 pixels"):  # Chiang et al. 2020, table 5: "-"
        PatchThreat(4, shape="rectangle").masks((40, 40))


@pytest.mark.parametrize(("share", "side"), [("1%", 23), ("2%", 32), ("3%", 39), ("0.002%", 2), ("100%", 224)])
def test_percent_is_the_smallest_square_of_at_least_that_area(share, side):
    assert PatchThreat(share).masks((224, 224)) == PatchThreat(side).masks((224, 224))


def test_percent_with_a_shape_counts_pixels():
    (mask,) = PatchThreat("25%", shape="parallelogram").masks((10, 10))
    assert sum(map(sum, mask)) == 25


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
def test_every_place_of_a_rectangle_once(height, width, h, w):
    threat = PatchThreat((h, w))
    if h > height or w > width:
        with pytest.raises(InputError, match="does not fit"):
            threat.locations((height, width))
        return
    found = threat.locations((height, width))
    boxes = [found.box(i) for i in range(len(found))]
    assert boxes == [(t, left, h, w) for t in range(height - h + 1) for left in range(width - w + 1)]
    pixels = [found.pixels(i) for i in range(len(found))]
    assert all(
        p.sum() == h * w and p[t : t + h, le : le + w].all() for p, (t, le, _, _) in zip(pixels, boxes, strict=True)
    )
    assert torch.stack(pixels).any(0).all()  # the last row and the last column are reached too


def test_only_shapes_that_fit_take_part():
    locations = PatchThreat(4, shape="line").locations((2, 5))
    assert [locations.box(i) for i in range(len(locations))] == [(t, le, 1, 4) for t in (0, 1) for le in (0, 1)]


def test_a_mask_is_cut_to_its_pixels():
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1, 2] = mask[2, 4] = True
    locations = PatchThreat(mask).locations((3, 4))
    assert list(locations.masks) == drawn("#.. ..#")
    assert len(locations) == 4
    assert locations.pixels(3).nonzero().tolist() == [[1, 1], [2, 3]]
    with pytest.raises(InputError, match="first row or column is empty: cut it off"):
        PatchThreat(mask, where=[(0, 0)])


def test_where():
    corners = PatchThreat((2, 3), where="corners").locations((5, 7))
    assert [corners.box(i)[:2] for i in range(4)] == [(0, 0), (0, 4), (3, 0), (3, 4)]
    assert len(corners) == 4
    assert len(PatchThreat(5, where="corners").locations((5, 5))) == 1
    places = PatchThreat(2, where=[(3, 1), (0, 0)]).locations((5, 5))
    assert [places.box(i)[:2] for i in range(2)] == [(3, 1), (0, 0)]
    with pytest.raises(InputError, match=r"leaves the picture"):
        PatchThreat(2, where=[(4, 0)]).locations((5, 5))


@pytest.mark.parametrize(
    "size",
    [*(0, -3, True, 2.0, None, "5x", "5", "0%", "101%", "-1%", "%", "1e1%", "nan%", (3,), (3, 4, 5), (0, 3), (3, True), ()),
     torch.zeros(3, 3).bool(), torch.ones(3, 3), torch.ones(3).bool(), torch.zeros(0, 0).bool()],
)  # fmt: skip
def test_bad_sizes(size):
    with pytest.raises(InputError):
        PatchThreat(size)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 4, "shape": "circle"},
        {"size": (2, 2), "shape": "square"},
        {"size": torch.ones(2, 2).bool(), "shape": "line"},
        {"size": 4, "count": 0},
        {"size": 4, "count": True},
        {"size": 4, "where": "middle"},
        {"size": 4, "where": ""},
        {"size": 4, "where": []},
        {"size": 4, "where": [(1,)]},
        {"size": 4, "where": [(-1, 0)]},
        {"size": 4, "where": [(0.5, 0)]},
        {"size": 4, "where": 5},
        {"size": 4, "where": [5]},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(InputError):
        PatchThreat(**arguments)


@pytest.mark.parametrize("threat", [PatchThreat(6), PatchThreat((1, 9)), PatchThreat(50, shape="diamond"),
                                    PatchThreat(7, shape="line"), PatchThreat(7, shape="square")])  # fmt: skip
def test_threats_that_do_not_fit(threat):
    with pytest.raises(InputError):
        threat.locations((5, 6))


@pytest.mark.parametrize("pixels", [0, -1, True, 1.5, "3"])
def test_bad_sparse_threats(pixels):
    with pytest.raises(InputError):
        SparseThreat(pixels)


masks = st.integers(1, 4).flatmap(
    lambda w: st.lists(st.lists(st.booleans(), min_size=w, max_size=w), min_size=1, max_size=4)
)
sizes = st.one_of(
    st.tuples(st.integers(1, 30)),
    st.tuples(st.tuples(st.integers(1, 30), st.integers(1, 30))),
    st.tuples(st.decimals("0.000000001", "99.999999999", places=9).map(lambda d: f"{d:f}%")),
    st.tuples(masks.filter(lambda m: any(map(any, m))).map(torch.tensor)),
    st.tuples(
        st.integers(1, 30) | st.just("2.5%"),
        st.sampled_from(["square", "rectangle", "line", "diamond", "parallelogram"]),
    ),
)
places = st.sampled_from(["anywhere", "corners"]) | st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1
)


@given(sizes, st.integers(1, 4), places)
def test_a_threat_survives_its_dictionary(size, count, where):
    if isinstance(size[0], torch.Tensor) and not isinstance(where, str):
        size = (torch.cat([size[0].any(0)[None], size[0]]),)  # no empty first row or column, which have no place
        size = (torch.cat([size[0].any(1)[:, None], size[0]], 1),)
    threat = PatchThreat(size[0], shape=size[1] if len(size) > 1 else None, count=count, where=where)
    again = threat_from_dict(threat.to_dict())
    assert again == threat
    assert hash(again) == hash(threat)
    assert again.to_dict() == threat.to_dict()
    assert str(again) == str(threat)

    def outcome(t):
        try:
            return t.masks((40, 31))
        except InputError as error:
            return str(error)

    assert outcome(again) == outcome(threat)


def test_different_threats_differ():
    different = [PatchThreat(5), PatchThreat(5, count=2), PatchThreat(5, where="corners"), PatchThreat(25, shape="line"),
                 PatchThreat((5, 6)), PatchThreat("5%"), PatchThreat(torch.eye(5).bool()), SparseThreat(5)]  # fmt: skip
    assert len(set(different)) == len({str(t) for t in different}) == len(different)
    assert PatchThreat(5) == PatchThreat((5, 5)) == PatchThreat(torch.ones(5, 5).bool())
    assert threat_from_dict(SparseThreat(3).to_dict()) == SparseThreat(3)


def test_parse_patch():
    assert parse_patch("5") == 5
    assert parse_patch("3x8") == (3, 8)
    assert parse_patch("2%") == "2%"
    for text in ("", "5x", "x5", "-5", "5 x 5", "five", "5.5", "3x8x2", "９x", "1" * 10):
        with pytest.raises(InputError):
            parse_patch(text)


def test_parse_where():
    assert parse_where("corners") == "corners"
    assert parse_where("anywhere") == "anywhere"
    assert parse_where("0,0;5,17") == [(0, 0), (5, 17)]
    for text in ("", "0", "0,0;", "-1,0", "0,0,0", "middle"):
        with pytest.raises(InputError):
            parse_where(text)
