"""The HTML report: self-contained, safe with untrusted names, the same for the same input, true in its colours."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from certipatch.report import Shown, page
from certipatch.report.chart import chart
from certipatch.report.colours import UNREACHED, colours, common_scale, png
from certipatch.report.words import attack, margin, percent, rows
from certipatch.threats import PatchThreat, SparseThreat

EVIL = '<script>alert("1")</script>\'"&'
VOID = {"meta", "img", "br"}


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
    return Shown(**(values | changes))


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


def text_of(html):
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
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
    assert "<script" not in html.lower()
    assert "script" not in {tag for tag, _ in tags}
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
    assert not {tag for tag, _ in tags} & {"link", "script", "iframe", "object", "a"}
    policy = next(attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
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
