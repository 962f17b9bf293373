"""The HTML report: self-contained, safe with untrusted names, the same for the same input, true in its colours."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from support import stripes, write_parquet, write_recipe
from torch import nn

from certipatch import cli, views
from certipatch.defenses import ClippedBagNet, Evidence, PatchGuard, PatchGuardPlusPlus
from certipatch.defenses import DerandomizedSmoothing as Smoothing
from certipatch.errors import InputError
from certipatch.report import CertifyPage, ReportImage, of_run, page, places, rebuild, shown_pictures
from certipatch.report.chart import chart
from certipatch.report.colours import UNREACHED, colours, common_scale, png
from certipatch.report.formatting import attack, margin, percent, rows
from certipatch.runs.certify import certify_files
from certipatch.runs.evaluate import evaluate_into
from certipatch.runs.experiment import DataRef
from certipatch.runs.records import read_records
from certipatch.saved import DefenseRef
from certipatch.threats import PatchThreat, SparseThreat
from certipatch.training import read, train

EVIL = '<script>alert("1")</script>\'"&'
VOID = {"meta", "img", "br", "input"}


def summary(**changes):
    return {
        "defense": "mnist-columns",
        "model_sha256": "9f" * 32,
        "dataset": "mnist",
        "split": "test",
        "images": 1000,
        "threat": PatchThreat(5).to_dict(),
        "notion": "recovery",
        "theorem": "n_y(out) − n_k(out) − |A| ≥ [y > k]",
        "clean_accuracy": 0.971,
        "clean_ci95": (0.959, 0.98),
        "certified_accuracy": 0.827,
        "certified_ci95": (0.802, 0.849),
        "seed": 0,
        "versions": {"python": "3.11.0", "torch": "2.11.0"},
        "dataset_note": "JPEG-recompressed copy",
        "certified_by_patch": {str(side): max(0.0, 0.95 - 0.025 * side) for side in range(1, 29)},
        **changes,
    }


def own_summary(**changes):
    keys = ("defense", "model_sha256", "threat", "notion", "theorem", "seed", "versions")
    return {key: summary()[key] for key in keys} | {"images": 3, "certified": 1} | changes


CONFIG = {"command": "evaluate", "settings": {"views": "columns", "band": 4}, "classes": ["0", "1"], "source": None}
TIMING = {"images_per_second": 412.5, "multiply_adds_per_image": 12_345_678, "device": "cpu"}


def shown(channels=1, **changes):
    rng = np.random.default_rng(0)
    values = {
        "image": rng.integers(0, 256, (28, 28, channels), np.uint8),
        "title": "picture 17",
        "target": "seven",
        "label": "seven",
        "certified": True,
        "margin": 3.0,
        "weakest": (2, 4, 5, 5),
        "largest_patch": 7,
        "map": rng.normal(size=(28, 28)),
    }
    return ReportImage(**(values | changes))


class Tags(HTMLParser):
    """Every tag with its attributes; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def data_of(html):
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.S)[0])


def text_of(html):
    body = re.sub(r"<(style|script).*?</\1>", "", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_numbers_and_sentence_of_an_evaluation():
    text = text_of(page(CONFIG, summary(), TIMING, [shown()]))
    for words in (
        "82.7\u202f%",
        "97.1\u202f%",
        "80.2–84.9\u202f%",
        "n = 1,000",
        "JPEG-recompressed copy",
        "n_y(out)",
        "settings · band",
        "12,345,678",
        "9f" * 32,
        "2.11.0",
        "largest certified patch",
    ):
        assert words.replace("\u202f", " ") in text.replace("\u202f", " ")
    assert (
        "827 are answered correctly with a proof: no 5×5-pixel patch, placed anywhere and painted in any way," in text
    )


def test_own_pictures():
    html = page({"command": "certify"}, own_summary(), None, [shown(target=None), shown(target=None, certified=False)])
    text = text_of(html)
    assert "1 of 3" in text
    assert "accuracy" not in text
    assert "true class" not in text
    assert "○ not certified" in text
    assert "Speed" not in text


@pytest.mark.parametrize("certified", [0, 1, 2])
def test_sentence_for_few_certified(certified):
    text = text_of(page({}, own_summary(certified=certified), None, []))
    words = [
        "none is answered with a proof that no",
        "1 is answered with a proof: no",
        "2 are answered with a proof: no",
    ]
    assert words[certified] in text


@pytest.mark.parametrize(
    ("one", "badge"),
    [
        (shown(), "✓ certified"),
        (shown(certified=False), "○ correct, not certified"),
        (shown(label="nine"), "✕ wrong"),
        (shown(label="nine", certified=False), "✕ wrong"),
    ],
)
def test_state_is_written(one, badge):
    assert badge in text_of(page(CONFIG, summary(), None, [one]))


def test_untrusted_text_is_escaped():
    config = {"command": EVIL, EVIL: {EVIL: [EVIL, {EVIL: EVIL}]}}
    evil = dict.fromkeys(("defense", "dataset", "split", "notion", "theorem", "dataset_note", "model_sha256"), EVIL)
    html = page(
        config, summary(**evil, versions={EVIL: EVIL}), {EVIL: EVIL}, [shown(title=EVIL, target=EVIL, label=EVIL)]
    )
    tags = Tags(html).found
    assert html.lower().count("<script") == html.lower().count("</script") == 2
    assert [attrs for tag, attrs in tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert data_of(html)["titles"] == [EVIL]
    assert data_of(html)["names"] == [EVIL]
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert next(attrs["alt"] for tag, attrs in tags if tag == "img") == f"{EVIL}, answered {EVIL}"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("found", [None, np.full((28, 28), -np.inf), np.full((28, 28), np.inf), np.zeros((28, 28))])
def test_every_kind_of_picture(channels, found):
    one = shown(channels, map=found, margin=float("-inf"), weakest=None, largest_patch=None)
    html = page(CONFIG, summary(), None, [one])
    Tags(html)
    assert "−∞" in html
    assert html.count("<img") == (1 if found is None else 2)
    assert "largest certified patch" not in html


def test_nothing_from_outside():
    html = page(CONFIG, summary(), TIMING, [shown(), shown(3)])
    assert not re.search(r"https?://", html)
    assert "url(" not in html
    assert 'src="/' not in html
    tags = Tags(html).found
    assert all(attrs["src"].startswith("data:image/png;base64,") for _, attrs in tags if "src" in attrs)
    assert not {tag for tag, _ in tags} & {"link", "iframe", "object", "a"}
    policy = next(attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", html, flags=re.S)[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    assert ("html", {"lang": "en"}) in tags
    assert all(attrs.get("alt") for tag, attrs in tags if tag == "img")


def test_small_and_deterministic():
    pictures = [shown(3, title=f"picture {i}") for i in range(40)]
    html = page(CONFIG, summary(), TIMING, pictures)
    assert len(html.encode()) < 1_000_000
    assert html == page(CONFIG, summary(), TIMING, pictures)


def test_large_pictures_are_made_smaller():
    picture = Image.open(io.BytesIO(base64.b64decode(png(np.zeros((600, 1200, 3), np.uint8)).split(",")[1])))
    assert picture.size == (384, 192)


def test_pictures_keep_their_pixels():
    image = shown(3).image
    back = Image.open(io.BytesIO(base64.b64decode(png(image).split(",")[1])))
    assert np.array_equal(np.asarray(back), image)


def test_map_is_red_exactly_where_a_patch_may_change_the_answer():
    margins = np.array([[-np.inf, -9, -1, -1e-9, 0, np.nan], [1e-9, 1, 5, 9, 100, 1e300]])
    red, _, blue = colours(margins, 9.0).astype(int).transpose(2, 0, 1)
    assert (red[0] > blue[0] + 50).all()
    assert (blue[1] > red[1] + 25).all()


def test_map_is_darker_further_from_zero():
    for sign in (-1, 1):
        brightness = colours(sign * np.linspace(0.01, 9, 40)[None], 9.0).astype(int).sum(2)[0]
        assert (np.diff(brightness) <= 0).all()
        assert brightness[0] > brightness[-1] + 200


def test_unreached_pixels_are_grey_and_explained():
    found = np.ones((28, 28))
    found[0] = np.inf
    assert tuple(colours(found, 1.0)[0, 0]) == UNREACHED
    assert "out of the attacker's reach" in text_of(page(CONFIG, summary(), None, [shown(map=found)]))
    assert "out of the attacker's reach" not in text_of(page(CONFIG, summary(), None, [shown()]))


def test_scale_is_common_and_finite():
    assert common_scale([np.array([[-7.0, np.inf]]), np.array([[3.0, -np.inf]])]) == 7
    assert common_scale([]) == common_scale([np.zeros((2, 2))]) == common_scale([np.full((2, 2), np.inf)]) == 1


@pytest.mark.parametrize(
    ("threat", "start"),
    [
        (PatchThreat((3, 8)), "no 3×8-pixel patch, placed anywhere"),
        (PatchThreat("2%"), "no square patch of 2% of the picture's area, placed"),
        (PatchThreat(25, shape="diamond"), "no diamond patch of 25 pixels, placed"),
        (PatchThreat(5, count=2), "no 2 patches at once, each a 5×5-pixel patch, placed"),
        (PatchThreat(5, where="corners"), "no 5×5-pixel patch, placed in a corner"),
        (PatchThreat(5, where=[(0, 0), (1, 2)]), "no 5×5-pixel patch, placed at 2 given places"),
        (SparseThreat(1), "no repainting of any 1 pixel, wherever"),
    ],
)
def test_threats_in_words(threat, start):
    assert attack(threat.to_dict()).startswith(start)
    Tags(page(CONFIG, summary(threat=threat.to_dict()), None, []))


def test_long_lists_of_settings_are_cut():
    (_, value), (_, files) = rows({"classes": list(range(1000)), "pictures": [{"file": str(i)} for i in range(1000)]})
    assert value.startswith("0, 1, 2,")
    assert files.startswith('{"file": "0"}, {"file": "1"}')
    assert value.endswith(", … (1,000 in all)")
    assert len(files) < 2000


def test_numbers_in_words():
    values = (3.0, 0.0, -0.25, float("inf"), float("-inf"), float("nan"))
    assert [margin(value) for value in values] == ["+3", "0", "−0.25", "+∞", "−∞", "unknown"]
    assert percent(0.12345, 100) == "12.3\u202f%"
    assert percent(0.12345, 10_000) == "12.35\u202f%"


def test_chart_marks_the_threat_and_stops_after_zero():
    by_patch = {str(side): max(0.0, 1 - side / 10) for side in range(1, 29)}
    drawn = chart(by_patch, 1.0, PatchThreat(5).to_dict())
    assert drawn is not None
    assert [side for _, _, side, _ in drawn.points] == list(range(1, 11))
    assert drawn.mark is not None
    assert drawn.mark[2:] == (5, 0.5)
    elsewhere = chart(by_patch, 1.0, PatchThreat(5, where="corners").to_dict())
    assert elsewhere is not None
    assert elsewhere.mark is None
    assert chart({"1": 0.5}, 1.0, PatchThreat(1).to_dict()) is None
    assert chart({str(side): 0.5 for side in range(1, 2000)}, 1.0, SparseThreat(3).to_dict()) is not None


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="uint8"):
        shown(image=np.zeros((28, 28, 1)))
    with pytest.raises(ValueError, match="map has the shape"):
        shown(map=np.zeros((5, 5)))


# ---- the explorer: what is embedded, and what a browser makes of it

SIZE, CLASSES = (6, 7), ("cat", "</script><script>window.hacked=1</script>", "dog & <b>", "eel")
CASES = {
    "votes": (Smoothing(nn.Identity(), views.Columns(2)), PatchThreat(2)),
    "rows": (Smoothing(nn.Identity(), views.Rows(2, wrap=False)), PatchThreat((1, 3))),
    "sums": (ClippedBagNet(nn.Identity(), views.Blocks(3, stride=2)), PatchThreat(2)),
    "masked": (PatchGuard(nn.Identity(), PatchThreat(2), views.Columns(3)), PatchThreat(2)),
    "detection": (PatchGuardPlusPlus(nn.Identity(), PatchThreat(2), views.Columns(1)), PatchThreat(2)),
    "lines": (Smoothing(nn.Identity(), views.Blocks(2)), PatchThreat(3, shape="line")),
}


def exhibit(case, n=5):
    """Certificates of random evidence, and the pictures, places and evidence of a page that shows them."""
    defense, threat = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    number = defense.number_of_views(SIZE)
    values = torch.rand(n, number, len(CLASSES), generator=generator)
    values[:, :, 1] += torch.linspace(-0.3, 1, n)[:, None]
    if isinstance(defense, Smoothing):
        unsure = torch.rand(n, number, generator=generator) < 0.05
        evidence = Evidence(values > 0.7, unsure, SIZE)
    else:
        evidence = Evidence(values * 4 if case == "detection" else values, None, SIZE)
    found = defense.certificate(evidence, threat)
    where = places(defense, found, SIZE, CLASSES)
    images = torch.randint(0, 256, (n, *SIZE, 3), generator=generator, dtype=torch.uint8).numpy()
    titles = [f"picture {i}" for i in range(n)]
    pictures = shown_pictures(images, titles, found, evidence, where, CLASSES, [None] * n, [i % 4 for i in range(n)])
    return found, pictures, where, evidence


def unpack(text, dtype, *shape):
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


@pytest.mark.parametrize("case", CASES)
def test_embedded_numbers_are_those_of_the_certificate(case):
    found, pictures, where, evidence = exhibit(case)
    data = data_of(page(CONFIG, summary(), None, pictures, where))
    explorer = data["explorer"]
    n, rows, number = len(pictures), explorer["rows"], explorer["views"]
    row_of = unpack(explorer["rowOf"], "<i4", -1)
    margins = unpack(explorer["margins"], "<i2" if explorer["whole"] else "<f4", n, rows)[:, row_of]
    expected = found.margin.numpy()
    assert np.array_equal(margins > 0, expected > 0)
    assert np.array_equal(margins, expected.astype(margins.dtype))
    assert np.array_equal(unpack(data["margin"], "<f8", -1), expected.min(1))
    sees = np.unpackbits(unpack(explorer["sees"], "u1", rows, -1), axis=1, count=number)
    assert np.array_equal(sees.astype(bool), found.sees.rows.numpy())
    if explorer["kind"] == "votes":
        bits = np.unpackbits(unpack(explorer["votes"], "u1", n, -1), axis=1, count=number * len(CLASSES))
        assert np.array_equal(bits.reshape(n, number, -1).astype(bool), evidence.values.numpy())
    else:
        assert where is not None
        kept = unpack(explorer["kept"], "<i4", n, -1)
        scores = unpack(explorer["scores"], "<f4", n, number, kept.shape[1])
        expected = np.take_along_axis(where.counted(evidence.values), kept[:, None], 2)
        assert np.array_equal(scores, expected)
        assert (kept[:, 0] == found.label.numpy()).all()


def test_maps_are_computed_from_all_places():
    """A corner touches fewer bands than the places beside it; a map of undominated rows alone would hide that."""
    found, pictures, _, _ = exhibit("votes")
    undominated = found.sees.undominated[found.sees.row_of]
    assert not undominated.all() or len(set(found.sees.sizes.tolist())) == 1
    for i, one in enumerate(pictures):
        assert np.array_equal(one.map, found.map(i).numpy())


@pytest.mark.parametrize(
    "threat",
    [
        PatchThreat((2, 3)),
        PatchThreat(7, shape="diamond"),
        PatchThreat(3, shape="line"),
        PatchThreat(2, where="corners"),
        PatchThreat(torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool), where=[(0, 0), (2, 3)]),
    ],
)
def test_maps_pixel_by_pixel(threat):
    evidence = Evidence(torch.rand(1, 7, 4, generator=torch.Generator().manual_seed(1)) > 0.6, None, SIZE)
    found = CASES["votes"][0].certificate(evidence, threat)
    expected = np.full(SIZE, np.inf)
    for location, value in enumerate(found.margin[0].tolist()):
        pixels = found.sees.locations.pixels(location).numpy()
        expected[pixels] = np.minimum(expected[pixels], value)
    assert np.array_equal(found.map(0).numpy(), expected)


def test_threats_without_single_places_have_no_explorer():
    defense = CASES["votes"][0]
    values = torch.rand(2, 7, 4) > 0.5
    for threat in (SparseThreat(2), PatchThreat(1, count=2)):
        evidence = Evidence(values, None, SIZE)
        found = defense.certificate(evidence, threat)
        assert places(defense, found, SIZE, CLASSES) is None
        images = np.zeros((2, *SIZE, 1), np.uint8)
        pictures = shown_pictures(images, ["a", "b"], found, evidence, None, CLASSES, [None] * 2, [0, 1])
        html = page(CONFIG, summary(threat=threat.to_dict()), None, pictures)
        assert data_of(html)["explorer"] is None
        assert 'id="explorer"' not in html


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = """
const wait = setInterval(() => {
  if (!document.documentElement.dataset.ready) return;
  clearInterval(wait);
  const results = [], stage = document.getElementById("stage"), text = (id) => document.getElementById(id).textContent;
  const press = (key, shiftKey = false) => stage.dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey, bubbles: true }));
  const note = () => results.push([text("name"), text("where"), text("margin"), text("touched"), text("says"),
    [...document.querySelectorAll("#evidence tr")].map(({ cells }) => [cells[0].firstChild.textContent, cells[2].textContent])]);
  document.getElementById("order").value = "data";
  document.getElementById("order").dispatchEvent(new Event("change"));
  while (text("name") !== "picture 0") press("n");
  for (let picture = 0; picture < PICTURES; picture++) {
    for (let k = 0; k < 9; k++) { press("ArrowUp"); press("ArrowLeft", true); press("ArrowLeft"); }
    for (let y = 0; y < 6; y++) {
      note();
      for (let x = 0; x < 7; x++) { press(y % 2 ? "ArrowLeft" : "ArrowRight"); note(); }
      press("ArrowDown");
    }
    press("w"); note();
    if (text("turn")) { press("t"); note(); }
    press("PageDown");
  }
  const filters = {};
  for (const input of document.querySelectorAll("input[name=outcome]")) {
    input.checked = true;
    input.dispatchEvent(new Event("change"));
    filters[input.value] = document.querySelectorAll("#thumbs li").length;
  }
  const box = stage.getBoundingClientRect();
  stage.dispatchEvent(new PointerEvent("pointerdown", { clientX: box.right - 1, clientY: box.bottom - 1, pointerId: 1 }));
  const pointed = text("where");
  const pre = document.createElement("pre");
  pre.id = "results";
  const found = { results, filters, pointed, hacked: window.hacked ?? null };
  pre.textContent = "RESULTS" + encodeURIComponent(JSON.stringify(found)) + "END";
  document.body.append(pre);
}, 20);
"""


def in_chromium(html, folder, pictures):
    """What DRIVER finds in a page that headless Chromium shows."""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    driven = policy.sub("", html).replace(
        "</body>", f"<script>{DRIVER.replace('PICTURES', str(pictures))}</script></body>"
    )
    (folder / "page.html").write_text(driven, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *flags, "--virtual-time-budget=20000", "--dump-dom", (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return json.loads(unquote(re.findall(r'id="results">RESULTS(.*?)END', done.stdout)[0]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("case", ["votes", "sums", "lines"])
def test_the_explorer_shows_the_margins_of_the_certificate(case, tmp_path):
    found, pictures, where, evidence = exhibit(case, 3)
    seen = in_chromium(page(CONFIG, summary(), None, pictures, where), tmp_path, 3)
    assert seen["hacked"] is None
    states = [one.state for one in pictures]
    assert seen["filters"] == {"all": 3} | {state: states.count(state) for state in ("certified", "open", "wrong")}
    assert where is not None
    box_of = {found.box(location): location for location in range(found.margin.shape[1])}
    visited = {name: set() for name in ("picture 0", "picture 1", "picture 2")}
    for name, rectangle, shown_margin, touched, says, table in seen["results"]:
        i = int(name.split()[1])
        top, bottom, left, right = map(int, re.findall(r"\d+", rectangle))
        location = box_of[top, left, bottom - top + 1, right - left + 1]
        visited[name].add(location)
        value = found.margin[i, location].item()
        assert shown_margin == margin(value)
        assert says.startswith("✓" if value > 0 else "○")
        attacked = found.sees.rows[found.sees.row_of[location]].clone()
        if evidence.unsure is not None:
            attacked |= evidence.unsure[i]
        assert touched == f"{int(attacked.sum())} of {len(attacked)}"
        outside = where.counted(evidence.values[[i]])[0][~attacked.numpy()].sum(0, dtype=np.float64)
        for row, text in table:
            number = float(text.split(" ")[0].replace("−", "-"))
            assert number == pytest.approx(outside[CLASSES.index(row)], rel=5.1e-3, abs=1e-6)
    shapes = found.sees.locations.shape
    for places_seen in visited.values():  # every place of the first shape was visited
        assert len(places_seen) >= int((shapes == shapes[0]).sum())
    assert [int(n) for n in re.findall(r"\d+", seen["pointed"])][1::2] == [SIZE[0] - 1, SIZE[1] - 1]


# ---- sizes


@pytest.mark.slow
@pytest.mark.parametrize(("side", "channels", "n"), [(32, 3, 1000), (44, 3, 800), (224, 3, 40)])
def test_the_page_stays_below_five_megabytes(side, channels, n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, channels), np.uint8)  # noise: the worst that can be
    found = np.ones((side, side))
    pictures = [shown(image=image, title=f"picture {i}", map=found) for i, image in enumerate(images)]
    html = page(CONFIG, summary(images=n), None, pictures)
    assert len(html.encode()) < 5_000_000
    kept = len(data_of(html)["titles"])
    text = text_of(html)
    assert kept == n or f"{kept:,} of {n:,} pictures are here, evenly spaced in the order of the data" in text
    assert (kept == n) == (side == 32)
    assert kept > n / 4


@pytest.mark.slow
def test_a_thousand_photos_with_scores_of_many_cells_fit():
    """Smooth pictures, as photos are, with a 10x10 grid of scores: all in the gallery, an even part in the explorer."""
    defense, threat, size = ClippedBagNet(nn.Identity(), views.Blocks(5, stride=3)), PatchThreat(4), (32, 32)
    rng = np.random.default_rng(0)
    number, n = defense.number_of_views(size), 1000
    evidence = Evidence(torch.rand(n, number, 10, generator=torch.Generator().manual_seed(0)), None, size)
    found = defense.certificate(evidence, threat)
    classes = tuple("abcdefghij")
    where = places(defense, found, size, classes)
    small = rng.integers(0, 256, (n, 8, 8, 3), np.uint8)
    images = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in small])
    titles = [f"picture {i}" for i in range(n)]
    pictures = shown_pictures(images, titles, found, evidence, where, classes, [None] * n, [0] * n)
    html = page(CONFIG, summary(), None, pictures, where)
    data = data_of(html)
    assert len(html.encode()) < 5_000_000
    assert len(data["titles"]) == n
    explored = len(unpack(data["explorer"]["index"], "<i4", -1))
    assert 200 < explored <= n
    assert explored == n or f"{explored:,} of the 1,000 pictures of the gallery can be explored" in text_of(html)


# ---- certipatch report


def quiet(done, total, text):
    """No progress bar."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_parquet(folder / "stripes")
    train(read(write_recipe(folder / "r.yaml", data=str(folder / "stripes"), epochs=1)), folder / "model")
    data = DataRef(str(folder / "stripes"), "test")
    evaluate_into(folder / "run", DefenseRef(str(folder / "model")), data, PatchThreat(2), quiet, report=of_run)
    plain = {"defense": "patchcleanser", "settings": {"masks": 3, "patch": 2}, "views": None, "objective": {}}
    whole = write_recipe(
        folder / "p.yaml", data=str(folder / "stripes"), epochs=1, name="plain", model={"name": "mlp"}, **plain
    )
    train(read(whole), folder / "plain")
    return folder


@pytest.fixture
def finished(home, tmp_path):
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


def test_a_report_is_rebuilt_from_the_run(finished):
    before = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert rebuild(finished).read_text() == before
    assert "All 40 pictures of the run are here." in text_of(before)
    assert not list(finished.glob("*.part"))


def test_numbers_come_from_the_records_not_from_the_summary(finished):
    before = (finished / "report.html").read_text()
    values = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(json.dumps(values | {"certified_accuracy": 0.999}))
    assert rebuild(finished).read_text() == before


def test_moved_data_and_model(home, tmp_path):
    for name in ("stripes", "model"):
        shutil.copytree(home / name, tmp_path / "old" / name)
    data = DataRef(str(tmp_path / "old" / "stripes"), "test")
    finished = tmp_path / "run"
    evaluate_into(finished, DefenseRef(str(tmp_path / "old" / "model")), data, PatchThreat(2), quiet)
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(InputError, match=r"the model of .* cannot be opened.*--model"):
        rebuild(finished)
    with pytest.raises(InputError, match=r"the pictures of .* cannot be opened.*--data"):
        rebuild(finished, model=str(home / "model"))
    assert rebuild(finished, str(home / "stripes"), str(home / "model")).exists()


def test_other_data_or_another_model_is_refused(home, finished, tmp_path):
    other = write_parquet(tmp_path / "other", size=(12, 12))
    table = yaml.safe_load((finished / "config.yaml").read_text())
    shutil.copy(other / "train-00000-of-00001.parquet", other / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"does not hold the pictures of .*fingerprint differs"):
        rebuild(finished, str(other))
    (finished / "config.yaml").write_text(yaml.safe_dump(table | {"model_sha256": "0" * 64}))
    with pytest.raises(InputError, match="is not the model of"):
        rebuild(finished)


@pytest.mark.slow
def test_unfinished_foreign_and_damaged_folders(finished, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    with pytest.raises(InputError, match="no run folder"):
        rebuild(tmp_path)
    for damaged, reason in (
        ({"command": "evaluate"}, "damaged settings"),
        (config | {"threat": {"kind": "patch"}}, "damaged settings"),
        (config | {"images": "many"}, "damaged settings"),
        (config | {"settings": 3}, "damaged settings"),
        (config | {"seed": 5}, "seed in config.yaml does not follow from the model"),
        (config | {"source": ["a"]}, "source is no text"),
        (config | {"command": "campaign"}, "report reads runs of evaluate, attack and certify"),
        (config | {"command": "attack"}, "damaged settings"),
    ):
        (finished / "config.yaml").write_text(yaml.safe_dump(damaged))
        with pytest.raises(InputError, match=reason):
            rebuild(finished)
    for text in (
        "seed: 2001-13-45",
        f"seed: {'1' * 6000}",
        "x: " + 20_000 * "[",
        "command: attack",
        "x: !!timestamp y",
    ):
        (finished / "config.yaml").write_text(f"command: evaluate\n{text}\n")
        with pytest.raises(InputError, match=r"no run folder: config.yaml cannot be read"):
            rebuild(finished)
    bomb = "command: evaluate\na0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 64)
    )
    (finished / "config.yaml").write_text(bomb)
    with pytest.raises(InputError, match="unfolds to more than"):
        rebuild(finished)
    (finished / "config.yaml").write_text(yaml.safe_dump(config))
    (finished / "summary.json").unlink()
    monkeypatch.setattr(sys, "argv", ["certipatch", "report", str(finished)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert "is not finished" in err


def test_reports_of_own_pictures_are_rebuilt_too(home, tmp_path):
    for i, (encoded, _) in enumerate(stripes(3, 7)):
        (tmp_path / f"{i}.png").write_bytes(encoded)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    certify_files(paths, DefenseRef(str(home / "model")), PatchThreat(2), tmp_path / "run", CertifyPage())
    before = (tmp_path / "run" / "report.html").read_text()
    assert data_of(before)["titles"] == ["0.png", "1.png", "2.png"]
    assert data_of(before)["explorer"] is not None
    assert rebuild(tmp_path / "run").read_text() == before
    paths[1].write_bytes(stripes(2, 8)[1][0])
    with pytest.raises(InputError, match=r"1\.png is no longer the picture .* with a new --out"):
        rebuild(tmp_path / "run")
    paths[1].unlink()
    with pytest.raises(InputError, match=r"a picture of .*: there is no file .*1\.png"):
        rebuild(tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace(str(paths[1]), "/dev/zero"))
    with pytest.raises(InputError, match="'/dev/zero' is not a regular file"):
        rebuild(tmp_path / "run")


def test_records_that_unfold_to_too_much_are_not_read(finished):
    (path,) = (finished / "records").glob("part-*.parquet")
    table = pq.read_table(path)
    large = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), pa.array(["a" * 2**20]))
    pq.write_table(table.set_column(table.schema.get_field_index("sha256"), "sha256", large), path)
    assert path.stat().st_size < 2**16
    with pytest.raises(InputError, match="far too much"):
        read_records(finished)
    with pytest.raises(InputError, match="were changed after they were written"):
        rebuild(finished)


def test_what_a_detection_certifies_is_said(home, tmp_path):
    from certipatch.cli.certify import line_of

    encoded, _ = stripes(1, 7)[0]
    (tmp_path / "0.png").write_bytes(encoded)
    found = certify_files(
        [tmp_path / "0.png"],
        DefenseRef("minority-reports", str(home / "plain")),
        PatchThreat(2),
        tmp_path / "run",
        CertifyPage(),
    )
    assert found["notion"] == "detection"
    (result,) = found["results"]
    said = {alarm: line_of(result | {"alarm": alarm, "certified": True}, PatchThreat(2)) for alarm in (True, False)}
    assert "ALARM" in said[True]
    assert "or raises an alarm" in said[False]
    page = (tmp_path / "run" / "report.html").read_text()
    assert data_of(page)["explorer"]["notion"] == "detection"
    assert "may change the answer without raising an alarm; blue" in page
