"""Comparing runs: the statistics against independent references, the files safe with untrusted names, one line for bad input."""

import base64
import csv
import hashlib
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, bootstrap, multinomial
from support import png, stripes, write_parquet

from certipatch import cli
from certipatch.comparison.figures import figures
from certipatch.comparison.gallery import read_pictures
from certipatch.comparison.notes import notes
from certipatch.comparison.paired import Z, mcnemar, paired, tango
from certipatch.comparison.pairs import compare, compare_runs
from certipatch.comparison.runs import CERTIFIED, RIGHT, read_run
from certipatch.comparison.texts import differences_csv, latex, markdown, to_dict
from certipatch.errors import InputError
from certipatch.report.table import in_csv, in_latex, in_markdown
from certipatch.runs.records import RECORD
from certipatch.threats import PatchThreat, SparseThreat

EVIL = '<script>alert("1")</script>|\\input{/etc/passwd}$x^2$_&%#~ [a](http://e.vil) `'
PATCH = PatchThreat(2)


def name_of(i: int) -> str:
    return hashlib.sha256(f"picture {i}".encode()).hexdigest()


def write_run(folder: Path, outcomes, *, first: int = 0, indices=None, hashes=None, parts: int = 2, **changes) -> Path:
    """A finished run whose picture i is wrong (0), raises an alarm (1), is right (2) or certified too (3)."""
    outcomes = np.asarray(outcomes)
    n = len(outcomes)
    indices = list(range(first, first + n)) if indices is None else list(indices)
    columns = dict.fromkeys(RECORD.names, [0] * n)
    columns |= {
        "index": indices,
        "sha256": hashes or [name_of(i) for i in indices],
        "target": [i % 3 for i in indices],
        "label": [i % 3 if code else (i + 1) % 3 for i, code in zip(indices, outcomes, strict=True)],
        "alarm": (outcomes == 1).tolist(),
        "certified": (outcomes == 3).tolist(),
        "margin": [1.0] * n,
        "passes": [changes.pop("passes", 1)] * n,
    }
    table = pa.table(columns, RECORD)
    (folder / "records").mkdir(parents=True)
    for k, rows in enumerate(np.array_split(np.arange(n), parts)):
        pq.write_table(table.take(rows), folder / "records" / f"part-{k:08d}.parquet")
    threat = changes.pop("threat", PATCH).to_dict()
    clean, certified = int((outcomes >= RIGHT).sum()), int((outcomes == CERTIFIED).sum())
    timing = changes.pop("timing", {"images_per_second": 200.0, "multiply_adds_per_image": 10**6, "device": "cpu"})
    config = {
        "command": "evaluate",
        "defense": "columns",
        "settings": changes.pop("settings", {"threshold": 0.3}),
        "image_size": changes.pop("image_size", [12, 12]),
        "classes": changes.pop("classes", ["top", "middle", "bottom"]),
        "dataset_note": changes.pop("note", None),
        "source": changes.pop("source", "nowhere"),
        "images": n,
        "threat": threat,
        "seed": 0,
        "model_sha256": "9f" * 32,
    }
    summary = {
        "defense": "columns",
        "dataset": "stripes",
        "split": "test",
        "images": n,
        "threat": threat,
        "notion": "recovery",
        "theorem": "n_y > n_k",
        "clean_accuracy": clean / n,
        "certified_accuracy": certified / n,
    } | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"defense": summary["defense"]}))
    (folder / "summary.json").write_text(json.dumps(summary))
    if timing is not None:
        (folder / "timing.json").write_text(json.dumps(timing))
    return folder


def codes(n: int, seed: int, chances=(0.1, 0.0, 0.3, 0.6)) -> np.ndarray:
    return np.random.default_rng(seed).choice(4, n, p=chances)


@pytest.fixture
def two(tmp_path) -> list[Path]:
    by_patch = {str(side): max(0.0, 0.9 - 0.15 * side) for side in range(1, 13)}
    return [
        write_run(tmp_path / "a", codes(120, 0), certified_by_patch=by_patch),
        write_run(tmp_path / "b", codes(120, 1), defense="masks", timing={"images_per_second": 20}, passes=36),
    ]


# --- the statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 7), (3, 3), (12, 2), (32, 15), (400, 310), (5000, 5100)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(c, b) == mcnemar(b, c)


def literal_tango(b: int, c: int, n: int) -> tuple[float, float]:
    """The definition: the constrained likelihood is maximised numerically, the score statistic set to ±z."""

    def score(delta: float) -> float:
        low, high = max(0.0, -delta), (1 - delta) / 2

        def unlikely(q: float) -> float:
            terms = ((b, q + delta), (c, q), (n - b - c, 1 - 2 * q - delta))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

        q = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        q = min((low, high, float(q)), key=unlikely)
        return (b - c - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))

    middle, edge = (b - c) / n, 1e-6
    low = -1.0 if c == n else brentq(lambda delta: score(delta) - Z, -1 + edge, middle - edge)
    high = 1.0 if b == n else brentq(lambda delta: score(delta) + Z, middle + edge, 1 - edge)
    return low, high


@pytest.mark.parametrize(
    ("b", "c", "n"),
    [(0, 0, 10), (1, 7, 21), (12, 2, 50), (0, 5, 40), (5, 5, 5 + 5), (9, 0, 9), (32, 15, 1000), (400, 310, 10_000)],
)
def test_tango_is_its_definition(b, c, n):
    assert tango(b, c, n) == pytest.approx(literal_tango(b, c, n), abs=2e-5)


def test_tango_as_published():
    # airway hyper-responsiveness of 21 children, in Fagerland, Lydersen & Laake 2014
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_at_its_ends():
    assert tango(0, 0, 100) == pytest.approx((-(Z**2) / (100 + Z**2), Z**2 / (100 + Z**2)))
    assert tango(7, 0, 7)[1] == 1.0
    assert tango(0, 7, 7)[0] == -1.0
    for b, c, n in [(3, 9, 30), (0, 4, 20), (11, 2, 13)]:
        assert tango(b, c, n) == pytest.approx(tuple(-end for end in reversed(tango(c, b, n))))
    for bad in [(-1, 0, 5), (3, 3, 5), (0, 0, 0)]:
        with pytest.raises(ValueError, match="cannot be"):
            tango(*bad)


def test_tango_excludes_zero_where_the_score_test_does():
    for b in range(0, 25):
        for c in range(0, 25):
            low, high = tango(b, c, 60)
            clear = b + c > 0 and (b - c) ** 2 / (b + c) > Z**2
            assert (low > 0 or high < 0) == clear


@pytest.mark.parametrize(
    ("p", "q", "n"), [(0.1, 0.1, 30), (0.25, 0.05, 30), (0.02, 0.02, 40), (0.3, 0.0, 20), (0.4, 0.3, 15)]
)
def test_coverage_at_small_counts_is_near_95_percent(p, q, n):
    """Exactly: the chances of all tables whose interval holds the true difference. A Wald interval has 80 to 93 % here."""
    covered = sum(
        multinomial.pmf([b, c, n - b - c], n, [p, q, 1 - p - q])
        for b in range(n + 1)
        for c in range(n + 1 - b)
        if (ends := tango(b, c, n))[0] <= p - q <= ends[1]
    )
    assert 0.935 <= covered <= 1


def test_coverage_by_simulation():
    generator = np.random.default_rng(0)
    counts = generator.multinomial(200, [0.08, 0.05, 0.87], size=2000)
    inside = [low <= 0.03 <= high for low, high in (tango(b, c, 200) for b, c, _ in counts.tolist())]
    assert 0.935 <= np.mean(inside) <= 0.97


def test_paired_counts_and_bootstrap():
    generator = np.random.default_rng(3)
    first = generator.random(1500) < 0.6
    second = np.where(generator.random(1500) < 0.15, ~first, first)
    found = paired(first, second)
    assert (found.both, found.second_only) == ((first & second).sum(), (second & ~first).sum())
    assert found.n == 1500
    assert found.difference == pytest.approx(second.mean() - first.mean())
    resampled = bootstrap(
        (second.astype(float) - first,), np.mean, n_resamples=4000, method="percentile", rng=generator
    )
    assert found.ci95 == pytest.approx(tuple(resampled.confidence_interval), abs=2e-3)
    with pytest.raises(ValueError, match="at least one"):
        paired(first[:0], second[:0])


# --- which pictures, which runs --------------------------------------------------------------------------------------


def test_numbers_are_counted_from_the_records(two):
    found = to_dict(compare(two))
    a, b = codes(120, 0), codes(120, 1)
    assert found["runs"][0]["clean_accuracy"] == (a >= RIGHT).mean()
    assert found["runs"][1]["forward_passes_per_image"] == 36
    assert found["runs"][1]["milliseconds_per_image"] == 50
    (pair,) = found["pairs"]
    counts = paired(a == CERTIFIED, b == CERTIFIED)
    assert pair["certified"]["first_only"] == counts.first_only
    assert pair["certified"]["difference"] == pytest.approx((b == CERTIFIED).mean() - (a == CERTIFIED).mean())
    table = [[counts.both, counts.first_only], [counts.second_only, counts.neither]]
    assert sum(map(sum, table)) == pair["images"] == 120
    assert pair["certified"]["p_value"] == pytest.approx(
        binomtest(counts.first_only, counts.first_only + counts.second_only).pvalue
    )


def test_pictures_are_matched_by_content_not_by_place(tmp_path):
    a, b = codes(60, 0), codes(60, 1)
    order = np.random.default_rng(0).permutation(60)
    plain = compare_runs([read_run(write_run(tmp_path / "a", a)), read_run(write_run(tmp_path / "b", b))])
    rows = write_run(tmp_path / "c", b[order], indices=order)
    assert to_dict(compare_runs([plain.runs[0], read_run(rows)]))["pairs"] == to_dict(plain)["pairs"]


def test_identical_pictures_are_paired_in_their_order(tmp_path):
    hashes = [name_of(0)] * 4 + [name_of(9)] * 2
    runs = [
        read_run(write_run(tmp_path / str(k), code, hashes=hashes, indices=range(0, 18, 3)))
        for k, code in enumerate(([3, 2, 3, 2, 0, 3], [2, 2, 3, 3, 0, 3]))
    ]
    counts = compare_runs(runs).pairs[0].certified
    assert counts is not None
    assert (counts.both, counts.first_only, counts.second_only, counts.neither) == (2, 1, 1, 2)


def test_runs_over_other_pictures_are_not_paired(tmp_path):
    folders = [
        write_run(tmp_path / "a", codes(50, 0)),
        write_run(tmp_path / "b", codes(50, 1), first=100, dataset="dots"),
    ]
    found = compare(folders)
    assert found.pairs[0].clean is None
    assert found.pairs[0].reason == "A (stripes test) and B (dots test) share no picture: not paired"
    assert "not paired" in markdown(found)
    assert notes(found)[0] == found.pairs[0].reason


def test_another_true_class_is_another_picture(tmp_path):
    indices = range(0, 30, 3)
    a = write_run(tmp_path / "a", [3] * 10, indices=indices)
    b = write_run(tmp_path / "b", [3] * 10, indices=range(1, 31, 3), hashes=[name_of(i) for i in indices])
    assert compare([a, b]).pairs[0].n == 0


def test_runs_that_share_some_pictures_are_paired_on_these(tmp_path):
    found = compare([write_run(tmp_path / "a", codes(100, 0)), write_run(tmp_path / "b", codes(80, 1), first=60)])
    assert found.pairs[0].n == 40
    a, b = codes(100, 0)[60:], codes(80, 1)[:40]
    assert found.pairs[0].certified == paired(a == CERTIFIED, b == CERTIFIED)
    assert any("40 pictures that both evaluated" in note for note in notes(found))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"threat": PatchThreat(3)}, "different threats"),
        ({"threat": SparseThreat(2)}, "different threats"),
        ({"image_size": [24, 24]}, "different threats"),
        ({"notion": "detection"}, "promise different things"),
    ],
)
def test_certificates_of_different_kinds_are_not_subtracted(tmp_path, changes, why):
    found = compare([write_run(tmp_path / "a", codes(50, 0)), write_run(tmp_path / "b", codes(50, 1), **changes)])
    assert found.pairs[0].certified is None
    assert found.pairs[0].clean is not None
    assert why in (found.pairs[0].reason or "")
    if "notion" in changes:
        assert re.search(r"\| detection \|.*\\\* \(", markdown(found))


def test_a_share_of_the_picture_is_the_square_that_it_means(tmp_path):
    threats = (PatchThreat("2%"), PatchThreat(2))  # 2 % of 12x12 pixels are 2.88: 2x2
    runs = [write_run(tmp_path / str(k), codes(30, k), threat=threat) for k, threat in enumerate(threats)]
    assert compare(runs).pairs[0].certified is not None


def test_an_alarm_on_a_clean_picture_is_wrong(tmp_path):
    runs = [write_run(tmp_path / str(k), [1, 1, 2, 3, 0], notion="detection") for k in range(2)]
    found = compare(runs)
    assert [(run.clean, run.certified) for run in found.runs] == [(2, 1), (2, 1)]
    assert found.pairs[0].certified is not None


def test_names_are_made_to_differ_by_what_differs(tmp_path):
    thresholds = [0.1, 0.2, 0.2, 0.2]
    runs = [write_run(tmp_path / str(k), codes(20, k), settings={"threshold": t}) for k, t in enumerate(thresholds)]
    names = [run.name for run in compare(runs).runs]
    assert names == ["columns, threshold 0.1, 0", *(f"columns, threshold 0.2, {k}" for k in (1, 2, 3))]
    other = write_run(tmp_path / "x", codes(20, 9), threat=PatchThreat(3))
    assert [run.name for run in compare([runs[0], other]).runs] == ["columns, 2x2 pixels", "columns, 3x3 pixels"]


def test_pairs_of_many_runs_are_with_the_first(tmp_path):
    runs = [write_run(tmp_path / str(k), codes(40, k), defense=f"d{k}") for k in range(6)]
    assert [(pair.first, pair.second) for pair in compare(runs).pairs] == [(0, k) for k in range(1, 6)]
    few = compare(runs[:4])
    assert len(few.pairs) == 6
    counts = few.agreement()
    assert counts is not None
    certified = np.stack([codes(40, k) == CERTIFIED for k in range(4)])
    assert counts["all"] == certified.all(0).sum()
    assert counts["none"] == (~certified).all(0).sum()
    assert counts["only C"] == (certified[2] & (certified.sum(0) == 1)).sum()


def test_sampled_certificates_are_named(tmp_path):
    runs = [write_run(tmp_path / "a", codes(20, 0)), write_run(tmp_path / "b", codes(20, 1), confidence=0.95)]
    assert any(note.startswith("B: certificates rest on samples") and "0.05" in note for note in notes(compare(runs)))


# --- the files -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every tag with its attributes; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def certipatch(monkeypatch, capsys, tmp_path):
    """Run a command; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["certipatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err  # type: ignore[return-value]

    return run


@pytest.mark.slow
def test_all_files_are_written_twice_the_same(certipatch, two, tmp_path):
    written = []
    for _ in range(2):
        code, out, _ = certipatch("compare", *two, "--out", tmp_path / "c")
        assert code == 0
        assert "certified, points" in out
        paths = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
        written.append({str(path.relative_to(tmp_path / "c")): path.read_bytes() for path in paths})
    files = written[0]
    assert written[1] == files
    drawings = {
        f"figures/{name}.{kind}"
        for name in ("differences", "patch-size", "cost-milliseconds")
        for kind in ("png", "pdf")
    }
    texts = {"comparison.md", "comparison.csv", "comparison.tex", "comparison.html", "comparison.json", "pairs.csv"}
    assert set(files) == drawings | texts | {"differences.csv"}  # one run alone knows its multiply-adds: no such figure
    html = files["comparison.html"].decode()
    assert not re.search(r"https?://|<script|url\(", html)
    assert "their data, nowhere, is not on this machine" in html
    tags = Tags(html).found
    assert sum(attrs.get("src", "").startswith("data:image/svg+xml;base64,") for _, attrs in tags) == 3
    assert all(attrs.get("alt") for tag, attrs in tags if tag == "img")


def test_differences_name_every_picture_that_differs(two):
    lines = list(csv.reader(io.StringIO(differences_csv(compare(two)))))
    assert lines[0] == ["index", "sha256", "A columns", "B masks"]
    a, b = codes(120, 0), codes(120, 1)
    assert [int(line[0]) for line in lines[1:]] == np.flatnonzero(a != b).tolist()
    words = ("wrong", "alarm", "right", "certified")
    assert all(line[1:] == [name_of(i := int(line[0])), words[a[i]], words[b[i]]] for line in lines[1:])


def test_json_and_formats(certipatch, two):
    code, out, err = certipatch("compare", *two, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out).keys() == {"runs", "pairs", "together", "method", "notes"}
    assert certipatch("compare", *two, "--format", "markdown")[1] == markdown(compare(two))
    assert certipatch("compare", *two, "--format", "latex")[1] == latex(compare(two))
    rows = list(csv.DictReader(io.StringIO(certipatch("compare", *two, "--format", "csv")[1])))
    assert [row["run"] for row in rows] == ["columns", "masks"]
    assert float(rows[1]["certified_minus_first"]) == pytest.approx(
        float(rows[1]["certified"]) - float(rows[0]["certified"])
    )
    assert rows[0]["notion"] == "recovery"


@pytest.mark.slow
def test_untrusted_names(certipatch, tmp_path):
    evil = {"dataset": EVIL, "split": EVIL, "theorem": EVIL, "classes": [EVIL] * 3, "note": EVIL}
    runs = [
        write_run(tmp_path / "a", codes(40, 0), defense=EVIL, settings={EVIL: EVIL}, **evil),
        write_run(tmp_path / "b", codes(40, 1), defense="=cmd|' /C calc'!A0", **evil, timing={"device": EVIL}),
        write_run(tmp_path / "c", codes(40, 2), defense="$\\frac{1\x1b[31m\n\u202e\ud800", **evil, notion=EVIL),
    ]
    code, out, _ = certipatch("compare", *runs, "--out", tmp_path / "o")
    assert code == 0
    assert "\x1b" not in out
    html = (tmp_path / "o" / "comparison.html").read_text()
    tags = Tags(html).found
    assert "script" not in {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    for source in (attrs["src"] for _, attrs in tags if attrs.get("src", "").startswith("data:image/svg")):
        drawing = base64.b64decode(source.split(",")[1]).decode()
        assert "<script" not in drawing
    names = [row[1] for row in csv.reader((tmp_path / "o" / "comparison.csv").open())][1:]
    assert names[1].startswith("'=")
    table = (tmp_path / "o" / "comparison.md").read_text().splitlines()
    rows = [line for line in table if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows[:5]}) == 1
    assert not any(re.search(r"<script|://|(?<!\\)\]", line) for line in table)
    tex = (tmp_path / "o" / "comparison.tex").read_text()
    assert "\\input" not in tex
    assert "\\textbackslash{}input\\{/etc/passwd\\}\\$x\\textasciicircum{}2\\$" in tex


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\tx", "\rx", "＝1"])
def test_no_formula_in_csv(text):
    assert str(in_csv(text)).startswith("'")
    assert in_csv(-0.5) == -0.5
    assert in_csv("a=1") == "a=1"


def test_escapes():
    assert in_latex("50 % − a_b é 漢 ≥") == "50 \\% $-$ a\\_b é ? ?"
    assert in_markdown("a|b*c_<i>&") == "a\\|b\\*c\\_&lt;i&gt;&amp;"


def test_the_gallery_shows_only_the_very_pictures(tmp_path):
    write_parquet(tmp_path / "data")
    encoded = [png_bytes for png_bytes, _ in stripes(40, 1)]
    hashes = [hashlib.sha256(one).hexdigest() for one in encoded]
    source = {"source": str(tmp_path / "data"), "hashes": hashes}
    runs = [
        write_run(tmp_path / "a", codes(40, 0), **source),
        write_run(tmp_path / "b", codes(40, 1), defense="m", **source),
    ]
    found = compare(runs)
    pictures = read_pictures(found)
    assert pictures.missing is None
    assert len(pictures.pixels) > 3
    for row, pixels in pictures.pixels.items():
        assert png(pixels[..., 0]) == encoded[found.pictures[row][1]]
    others = [write_run(tmp_path / k, codes(40, i), defense=k, source=source["source"]) for i, k in enumerate("xy")]
    lost = read_pictures(compare(others))
    assert lost.pixels == {}
    assert "does not hold picture" in (lost.missing or "")


def test_no_figure_without_something_to_show(tmp_path):
    runs = [write_run(tmp_path / k, codes(20, 0), defense=k, threat=SparseThreat(2), timing=None) for k in "ab"]
    assert set(figures(compare(runs))) == {"differences"}
    found = compare([write_run(tmp_path / k, [0] * 20, defense=k, first=99 * i) for i, k in enumerate("cd")])
    assert set(figures(found)) == {"patch-size", "cost-multiply-adds", "cost-milliseconds"}


# --- bad input ---------------------------------------------------------------------------------------------------------


def refused(answer: tuple[int, str, str]) -> str:
    code, out, err = answer
    assert (code, out) == (2, ""), answer
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    return err


def test_bad_arguments(certipatch, two, tmp_path):
    assert "two or more" in refused(certipatch("compare", two[0]))
    assert "given 2 times" in refused(certipatch("compare", two[0], two[1], two[0] / ".." / "a"))
    assert "no run folder" in refused(certipatch("compare", two[0], tmp_path / "none"))
    assert "'pdf'" in refused(certipatch("compare", *two, "--format", "pdf"))
    assert "not both" in refused(certipatch("compare", *two, "--json", "--format", "csv"))
    assert "run folder" in refused(certipatch("compare", *two, "--out", two[0]))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(certipatch("compare", *two, "--out", tmp_path / "file"))
    assert "--out" in refused(certipatch("compare", *two, "--data", "mnist"))


def edited(run: Path, name: str, **changes) -> None:
    values = yaml.safe_load((run / name).read_text()) | changes
    (run / name).write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("config.yaml", {"command": "certify"}, "a run of certify"),
        ("config.yaml", {"command": [[1] * 9]}, "a run of (list)"),
        ("config.yaml", {"image_size": [0, 12]}, "0x12"),
        ("config.yaml", {"image_size": "large"}, "damaged"),
        ("summary.json", {"images": 121}, "records of 120 pictures"),
        ("summary.json", {"certified_accuracy": 0.999}, "99.90% certified"),
        ("summary.json", {"certified_accuracy": None}, "damaged"),
        ("summary.json", {"threat": {"kind": "patch"}}, "damaged"),
        ("summary.json", {"threat": PatchThreat(5).to_dict() | {"size": [10**9, 10**9]}}, "1000000000"),
        ("summary.json", {"threat": 5}, "damaged"),
        ("summary.json", {"certified_by_patch": {"one": 0.5}}, "damaged"),
        ("summary.json", {"certified_by_patch": {"1": 1.5}}, "1.5"),
        ("summary.json", {"certified_by_patch": {"1": float("nan")}}, "nan"),
    ],
)
def test_damaged_settings(certipatch, two, name, changes, said):
    edited(two[1], name, **changes)
    assert said in refused(certipatch("compare", *two))


def test_damaged_files(certipatch, two):
    part = two[1] / "records" / "part-00000001.parquet"
    good = part.read_bytes()

    def answer() -> str:
        return refused(certipatch("compare", *two))

    part.write_bytes(good[: len(good) // 2])
    assert "cannot read the records" in answer()
    part.unlink()
    assert "records of 60 pictures" in answer()
    table = pq.read_table(io.BytesIO(good))
    for name, values, said in (
        ("sha256", ["x" * 64] * 60, "sha256"),
        ("sha256", list(range(60)), "cannot read the records"),
        ("index", [0] * 60, "twice"),
        ("label", [None] * 60, "gaps"),
        ("certified", ["maybe"] * 60, "cannot read the records"),
    ):
        pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), part)
        assert said in answer()
    pq.write_table(table.drop_columns("alarm"), part)
    assert "columns" in answer()
    pq.write_table(table, part, use_dictionary=False, compression="none")
    huge = table.append_column("more", pa.array(["x" * 50_000] * 60))
    pq.write_table(huge, part, use_dictionary=False)
    assert "too large" in answer()
    part.write_bytes(good)
    (two[1] / "timing.json").write_text("{" * 100_000)
    assert "timing.json" in answer()
    (two[1] / "timing.json").write_text('{"a":' * 100_000)
    answer()
    (two[1] / "timing.json").write_text('{"images_per_second": "fast"}')
    assert certipatch("compare", *two)[0] == 0
    (two[1] / "summary.json").write_text(" " * 5_000_000)
    assert "no file of at most 4 MB" in answer()
    (two[1] / "summary.json").unlink()
    assert "is not finished (120 of 120 pictures)" in answer()
    (two[1] / "config.yaml").write_text("a: *b")
    assert "no run folder" in answer()


@pytest.mark.parametrize("text", [pa.string(), pa.binary(10**6)])
def test_long_texts_in_the_place_of_numbers_are_not_unfolded(two, text):
    part = two[1] / "records" / "part-00000001.parquet"
    table = pq.read_table(part)
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), pa.array([b"x" * 10**6]).cast(text))
    for name in ("certified", "sha256") if text != pa.string() else ("certified",):
        pq.write_table(table.set_column(table.column_names.index(name), name, long), part, store_schema=False)
        assert part.stat().st_size < 10**6
        with pytest.raises(InputError, match=f"cannot read the records.*holds text in the column {name}"):
            read_run(two[1])


def test_an_alias_bomb_is_not_unfolded(certipatch, two):
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    config = yaml.safe_load((two[1] / "config.yaml").read_text())
    del config["settings"], config["dataset_note"]
    text = yaml.safe_dump(config) + "\n".join(layers) + "\nsettings: {bomb: *a11}\ndataset_note: *a11\n"
    (two[1] / "config.yaml").write_text(text)
    assert "unfolds" in refused(certipatch("compare", *two))
