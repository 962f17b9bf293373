"""The tables of a comparison in Markdown, CSV and LaTeX. Names are untrusted and are escaped for each."""

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from certipatch.evaluation.paired import Paired
from certipatch.report import words
from certipatch.report.compare import METHOD, Comparison, Pair
from certipatch.report.compare_runs import NOT_EVALUATED, OUTCOMES, Run, plain

LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "''",
    "`": "\\textasciigrave{}",
    "[": "{[}",
    "]": "{]}",
    "−": "$-$",
    "×": "$\\times$",
    "±": "$\\pm$",
    "χ": "$\\chi$",
    "²": "$^2$",
    "½": "1/2",
    "–": "--",
    "…": "\\ldots{}",
    "\u202f": "\\,",
}


@final
@dataclass(frozen=True)
class Table:
    """A table in words, not yet escaped for anything. The first ``left`` columns are text, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int


def tables(found: Comparison) -> list[Table]:
    """The runs; their differences; how often their certificates agree."""
    return [
        runs_table(found),
        differences_table(found),
        *([agreement] if (agreement := agreement_table(found)) else []),
    ]


def runs_table(found: Comparison) -> Table:
    several = len({run.data for run in found.runs}) > 1
    header = ("", "run", *(("data",) if several else ()), "threat", "notion")
    numbers = ("n", "clean, %", "certified, %", "passes", "multiply-adds", "ms")
    rows = [
        (
            letter,
            run.name,
            *((run.data,) if several else ()),
            str(run.threat),
            run.notion,
            f"{run.n:,}",
            accuracy(run, run.clean),
            accuracy(run, run.certified, "*" if run.notion == "detection" else ""),
            number(run.passes),
            amount(run.multiply_adds),
            number(run.milliseconds),
        )
        for letter, run in zip(found.letters, found.runs, strict=True)
    ]
    marked = "; *: certified by detection" if any(run.notion == "detection" for run in found.runs) else ""
    title = f"{found.title()}; in brackets 95 % intervals; cost per picture{marked}"
    return Table(title, (*header, *numbers), tuple(rows), len(header))


def differences_table(found: Comparison) -> Table:
    rows = [
        (
            f"{found.letters[pair.second]} − {found.letters[pair.first]}",
            f"{pair.n:,}",
            points(pair.clean) if pair.clean else "not paired",
            p_value(pair.clean) if pair.clean else "",
            points(pair.certified) if pair.certified else why(pair),
            p_value(pair.certified) if pair.certified else "",
        )
        for pair in found.pairs
    ]
    header = ("difference", "same pictures", "clean, points", "p", "certified, points", "p")
    return Table("Differences on the same pictures, in percentage points, with 95 % intervals", header, tuple(rows), 1)


def agreement_table(found: Comparison) -> Table | None:
    """Which of two runs certifies a picture; None where no two runs' certificates compare."""
    rows = [
        (
            f"{found.letters[pair.first]} and {found.letters[pair.second]}",
            *(f"{k:,}" for k in (counts.both, counts.first_only, counts.second_only, counts.neither)),
        )
        for pair in found.pairs
        if (counts := pair.certified)
    ]
    header = ("runs", "both certify", "only the first", "only the second", "neither")
    return Table("Which pictures are certified", header, tuple(rows), 1) if rows else None


def accuracy(run: Run, count: int, mark: str = "") -> str:
    """63.0 (60.0–65.9), in percent."""
    low, high = (words.percent(bound, run.n)[:-2] for bound in run.interval(count))
    return f"{words.percent(count / run.n, run.n)[:-2]}{mark} ({low}–{high})"


def points(one: Paired) -> str:
    """+1.7 (+0.4 to +3.1), in percentage points."""
    low, high = one.ci95
    return f"{_point(one.difference, one.n)} ({_point(low, one.n)} to {_point(high, one.n)})"


def p_value(one: Paired) -> str:
    """0.019, <0.001."""
    return "<0.001" if one.p_value < 0.001 else f"{one.p_value:.2g}"


def why(pair: Pair) -> str:
    """Why certified accuracies are not subtracted, in two words."""
    return {"notion": "another notion", "threat": "another threat"}.get(pair.apart or "", "not paired")


def number(value: float | None) -> str:
    """2.98, 305, 12,000."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 99.95 or value == round(value) else f"{value:.3g}"


def amount(value: float | None) -> str:
    """33 M."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value is not None and value >= 0.9995 * unit:
            return f"{number(value / unit)}{name}"
    return number(value)


def sentences(found: Comparison) -> list[str]:
    """What has to be known beside the tables."""
    notes = [METHOD, *found.notes]
    if counts := found.together():
        members = [key.removeprefix("only ") for key in counts if key.startswith("only ")]
        alone = ", ".join(f"only {letter} {counts[f'only {letter}']:,}" for letter in members)
        notes.append(
            f"of {counts['pictures']:,} pictures, {', '.join(members)} all certify {counts['all']:,}, none of them "
            f"{counts['none']:,}; {alone}"
        )
    return [note[:1].upper() + note[1:] + ("" if note.endswith(".") else ".") for note in notes]


def markdown(found: Comparison) -> str:
    """All tables and notes as GitHub Markdown."""
    parts = []
    for table in tables(found):
        rule = ["---" if i < table.left else "---:" for i in range(len(table.header))]
        lines = [[in_markdown(cell) for cell in row] for row in (table.header, *table.rows)]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
        parts.append(f"**{in_markdown(table.title)}**\n\n{rows}")
    notes = [in_markdown(note) for note in sentences(found)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


def latex(found: Comparison) -> str:
    """All tables as LaTeX, for the package booktabs; notes as comments."""
    comments = "".join(f"% {in_latex(note)}\n" for note in sentences(found))
    parts = ["% needs \\usepackage{booktabs,textcomp}\n" + comments]
    for table in tables(found):
        columns = "l" * table.left + "r" * (len(table.header) - table.left)
        lines = [" & ".join(in_latex(cell) for cell in row) + " \\\\" for row in (table.header, *table.rows)]
        body = "\n    ".join(["\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule"])
        parts.append(
            f"\\begin{{table}}\n  \\centering\n  \\caption{{{in_latex(table.title)}}}\n"
            f"  \\begin{{tabular}}{{{columns}}}\n    {body}\n  \\end{{tabular}}\n\\end{{table}}\n"
        )
    return "\n".join(parts)


def comma_separated(found: Comparison) -> str:
    """One line per run, accuracies as fractions, with its paired difference to the first."""
    header = "letter run folder dataset split n threat notion clean clean_low clean_high certified certified_low certified_high"
    header += " passes multiply_adds milliseconds device same_pictures"
    difference = [f"{kind}_minus_first{end}" for kind in ("clean", "certified") for end in ("", "_low", "_high", "_p")]
    with_first = {pair.second: pair for pair in found.pairs if pair.first == 0}
    lines: list[list[object]] = []
    for i, run in enumerate(found.runs):
        line: list[object] = [
            found.letters[i],
            run.name,
            plain(str(run.folder), 4096),
            run.dataset,
            run.split,
            run.n,
            str(run.threat),
        ]
        line += [run.notion, run.clean / run.n, *run.interval(run.clean)]
        line += [run.certified / run.n, *run.interval(run.certified)]
        line += [run.passes, run.multiply_adds, run.milliseconds, run.device]
        pair = with_first.get(i)
        line += [pair.n if pair else None]
        for one in (pair.clean, pair.certified) if pair else (None, None):
            line += [one.difference, *one.ci95, one.p_value] if one else [None] * 4
        lines.append(line)
    return _csv([header.split() + difference, *lines])


def pairs_separated(found: Comparison) -> str:
    """One line per pair of runs and kind of accuracy."""
    header = "first second kind n difference low high p both first_only second_only neither reason"
    lines: list[list[object]] = [[*header.split()]]
    for pair in found.pairs:
        for kind, one in (("clean", pair.clean), ("certified", pair.certified)):
            line: list[object] = [found.letters[pair.first], found.letters[pair.second], kind, pair.n]
            if one is None:
                line += [None] * 8 + [pair.reason]
            else:
                line += [one.difference, *one.ci95, one.p_value, one.both, one.first_only, one.second_only]
                line += [one.neither, None]
            lines.append(line)
    return _csv(lines)


def differences(found: Comparison) -> str:
    """One line per picture whose outcome is not the same in all runs that evaluated it, as CSV."""
    mark = {"detection": ", detection"}
    names = [
        f"{letter} {run.name}{mark.get(run.notion, '')}" for letter, run in zip(found.letters, found.runs, strict=True)
    ]
    lines: list[list[object]] = [["index", "sha256", *names]]
    for (sha256, index), row in zip(found.pictures, found.outcomes.tolist(), strict=True):
        if len({code for code in row if code != NOT_EVALUATED}) > 1:
            lines.append([index, sha256, *("" if code == NOT_EVALUATED else OUTCOMES[code] for code in row)])
    return _csv(lines)


def in_markdown(text: str) -> str:
    """Text that Markdown shows as it is, also in a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = text.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")  # no links, nobody called
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", text)


def in_latex(text: str) -> str:
    """Text that LaTeX typesets as it is. Characters that not every engine knows lose their accents or become ``?``."""
    return "".join(LATEX.get(c) or _ascii(c) for c in text)


def in_csv(value: object) -> object:
    """A value that no spreadsheet takes for a formula; numbers stay numbers."""
    if isinstance(value, str) and value.startswith(
        ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
    ):
        return "'" + value
    return value


def _ascii(character: str) -> str:
    if character.isascii() or "\u00c0" <= character <= "\u00ff":  # letters of Western Europe, which inputenc knows
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(LATEX.get(c, c) for c in plain) or "?"


def _csv(lines: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([in_csv(value) for value in line] for line in lines)
    return file.getvalue()


def _point(fraction: float, n: int) -> str:
    digits = 2 if n >= 10_000 else 1
    text = f"{100 * abs(fraction):.{digits}f}"
    return text if not float(text) else ("+" if fraction > 0 else "−") + text
