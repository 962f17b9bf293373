"""sees against brute force from pixel sets, and its size on ImageNet pictures."""

import subprocess
import sys
from itertools import combinations_with_replacement
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import certipatch as cp
from certipatch import views as vw
from certipatch.errors import InputError
from certipatch.threats import PatchThreat, SparseThreat
from certipatch.views.incidence import sees


def literal(views, threat, size):
    """Row l, view v: some pixel of one of location l's patches is visible. One row per place of a single patch."""
    visible = views.visible(size)
    locations = threat.locations(size)
    return torch.stack([(visible & locations.pixels(i)).flatten(1).any(1) for i in range(len(locations))])


def row_set(rows):
    return set(map(tuple, rows.tolist()))


def maximal(rows):
    return {r for r in rows if not any(r != o and all(a <= b for a, b in zip(r, o, strict=True)) for o in rows)}


views_of = st.builds(
    lambda kind, *sizes: kind(*sizes),
    st.sampled_from([vw.Columns, vw.Rows, vw.Blocks]), st.integers(1, 4), st.integers(1, 5), st.booleans(),
    st.sampled_from([1, 1, 1, 2]),
)  # fmt: skip
patches = st.one_of(
    st.builds(lambda h, w: {"size": (h, w)}, st.integers(1, 4), st.integers(1, 4)),
    st.builds(
        lambda n, s: {"size": n, "shape": s}, st.integers(2, 9), st.sampled_from(["line", "diamond", "parallelogram"])
    ),
    st.just({"size": torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()}),
)
places = st.sampled_from(["anywhere", "anywhere", "corners", [(0, 0), (1, 1), (0, 0)]])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(views_of, patches, places, st.integers(1, 2), st.integers(3, 7), st.integers(3, 7))
def test_against_brute_force(views, patch, where, count, height, width):
    size, threat = (height, width), PatchThreat(**patch, where=where, count=count)
    try:
        expected = literal(views, threat, size)
    except ValueError:  # views or patch do not fit
        with pytest.raises(ValueError):  # noqa: PT011
            sees(views, threat, size)
        return
    found = sees(views, threat, size)
    assert len(row_set(found.rows)) == len(found.rows) == found.number_of_rows
    assert torch.equal(found.sizes, found.rows.sum(1))
    chosen = {r for r, keep in zip(map(tuple, found.rows.tolist()), found.undominated.tolist(), strict=True) if keep}
    assert chosen == maximal(row_set(found.rows))
    if count == 1:
        assert torch.equal(found.rows[found.row_of], expected)
        assert found.choices.flatten().tolist() == list(range(len(expected)))
    else:
        pairs = {tuple(a or b for a, b in zip(one, two, strict=True))
                 for one in row_set(expected) for two in row_set(expected)}  # fmt: skip
        assert chosen == maximal(pairs)
        n = len(maximal(row_set(expected)))
        assert len(found.row_of) == len(found.choices) == n * (n + 1) // 2
        one, two = found.choices.T
        assert torch.equal(
            found.rows[found.row_of], expected[one] | expected[two]
        )  # each pair's row is that of its places


def test_three_patches_and_sparse():
    views, size = vw.Columns(2, stride=3), (3, 9)
    found = sees(views, PatchThreat(2, count=3), size)
    single = literal(views, PatchThreat(2), size)
    unions = {
        tuple((single[i] | single[j] | single[k]).tolist())
        for i, j, k in combinations_with_replacement(range(len(single)), 3)
    }
    assert maximal(row_set(found.rows)) == maximal(unions)
    same = sees(views, PatchThreat(1, count=2), size)
    assert torch.equal(sees(views, SparseThreat(2), size).rows, same.rows)


def test_views_as_a_tensor():
    visible = torch.rand(9, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.2
    found = sees(visible, PatchThreat(2), (5, 6))
    assert torch.equal(found.rows[found.row_of], literal(vw.PixelSets(visible), PatchThreat(2), (5, 6)))


def test_a_stride_that_does_not_divide_touches_more_bands_than_the_formula_says():
    # 10 columns, bands of 4 every 3: bands start at 0, 3, 6, 9; the last one wraps over the first two columns.
    found = sees(vw.Columns(4, stride=3), PatchThreat((1, 2)), (1, 10))
    assert int(found.sizes.max()) == 3 > ceil((2 + 4 - 1) / 3) == 2
    assert found.rows[found.row_of[2]].tolist() == [True, True, False, True]
    assert found.rows[found.row_of[8]].tolist() == [False, False, True, True]
    flat = sees(vw.Columns(4, stride=3, wrap=False), PatchThreat((1, 3)), (1, 12))  # bands at 0, 3, 6, 8
    assert int(flat.sizes.max()) == 3 > ceil((3 + 4 - 1) / 3) == 2


def test_the_paper_formula_where_it_holds():
    for m, s in ((1, 1), (5, 4), (3, 7)):
        assert (sees(vw.Columns(s), PatchThreat(m), (28, 28)).sizes == m + s - 1).all()
        assert (sees(vw.Blocks(s), PatchThreat(m), (28, 28)).sizes == (m + s - 1) ** 2).all()


def test_errors():
    with pytest.raises(InputError, match="does not fit"):
        sees(vw.Columns(2), PatchThreat(9), (8, 8))
    with pytest.raises(ValueError, match="does not fit"):
        sees(vw.Columns(9), PatchThreat(2), (8, 8))
    with pytest.raises(InputError, match="exceed 512 MiB"):
        sees(vw.Blocks(4), PatchThreat(5, count=3), (32, 32))
    with pytest.raises(InputError, match="exceed 512 MiB"):
        sees(vw.Columns(4), SparseThreat(50), (32, 32))
    with pytest.raises(InputError, match=r"more than 10\^15 locations"):
        sees(vw.Blocks(4), PatchThreat(1, count=500), (32, 32))


def test_more_patches_than_views_can_tell_apart_cost_nothing():
    for count in (2, 3, 10**9):  # the first of two rows that both masks see
        found = sees(torch.ones(2, 4, 4, dtype=torch.bool), PatchThreat(2, count=count), (4, 4))
        assert (found.number_of_rows, found.choices.shape) == (1, (1, 2))
    halves = torch.zeros(2, 4, 4, dtype=torch.bool)
    halves[0, :, :2], halves[1, :, 2:] = True, True
    two, many = (sees(halves, PatchThreat(1, count=count), (4, 4)) for count in (2, 10**9))
    assert torch.equal(two.rows, many.rows)
    assert torch.equal(two.row_of, many.row_of)


BIG = """
import re
from pathlib import Path
from certipatch import views as vw
from certipatch.views.incidence import sees
from certipatch.threats import PatchThreat
for views, number in ((vw.Columns(25), 224), (vw.Blocks(25, stride=8), 784)):
    found = sees(views, PatchThreat("2%"), (224, 224))
    assert found.number_of_views == number and len(found.row_of) == 193 ** 2
    found.undominated
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())  # getrusage would count the parent's too
print(int(peak[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_imagenet_size_in_a_gibibyte():
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1  # GiB, with everything that torch takes


def test_the_function_stays_a_function_after_its_module_was_imported():
    found = cp.sees(vw.Columns(2), PatchThreat(1), (3, 3))
    assert found.number_of_views == 3
