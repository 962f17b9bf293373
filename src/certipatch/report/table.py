"""Tables in Markdown, LaTeX and CSV. Their texts are untrusted and are escaped for each."""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

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
    left: int = 1

    def markdown(self) -> str:
        """The title in bold and a GitHub table."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.header))]
        header, *rows = [[in_markdown(cell) for cell in row] for row in (self.header, *self.rows)]
        lines = ["| " + " | ".join(line) + " |" for line in (header, rule, *rows)]
        return f"**{in_markdown(self.title)}**\n\n" + "\n".join(lines)

    def latex(self) -> str:
        """A floating table for the package booktabs."""
        columns = "l" * self.left + "r" * (len(self.header) - self.left)
        header, *rows = [" & ".join(map(in_latex, row)) + " \\\\" for row in (self.header, *self.rows)]
        body = "\n    ".join(["\\toprule", header, "\\midrule", *rows, "\\bottomrule"])
        return (
            f"\\begin{{table}}\n  \\centering\n  \\caption{{{in_latex(self.title)}}}\n"
            f"  \\begin{{tabular}}{{{columns}}}\n    {body}\n  \\end{{tabular}}\n\\end{{table}}\n"
        )


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """CSV; no spreadsheet takes one of its texts for a formula."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([in_csv(value) for value in line] for line in lines)
    return file.getvalue()


def in_markdown(text: str) -> str:
    """Text that Markdown shows unchanged, also in a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = text.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")  # no links, nobody called
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", text)


def in_latex(text: str) -> str:
    """Text that LaTeX typesets unchanged. Characters that not every engine knows lose their accents or become ``?``."""
    return "".join(LATEX.get(c) or _ascii(c) for c in text)


def in_csv(value: object) -> object:
    """A value that no spreadsheet takes for a formula; numbers stay numbers."""
    signs = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
    return "'" + value if isinstance(value, str) and value.startswith(signs) else value


def _ascii(character: str) -> str:
    if character.isascii() or "\u00c0" <= character <= "\u00ff":  # letters of Western Europe, which inputenc knows
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(LATEX.get(c, c) for c in plain) or "?"
