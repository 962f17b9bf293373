"""A table in the form of a paper: our rows beside the paper's rows, in text, Markdown, CSV and JSON."""

import csv
import io
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from jaxtyping import Float

from certipatch.runs.metrics import wilson


@final
@dataclass(frozen=True)
class Share:
    """A measured share of n images, with its Wilson 95 % interval."""

    count: int
    n: int
    at: str = ""
    """The parameters of the share, if they were chosen."""

    @property
    def percent(self) -> float:
        return 100 * self.count / self.n

    def __str__(self) -> str:
        low, high = wilson(self.count, self.n)
        return f"{self.percent:.1f} ±{50 * (high - low):.1f}" + (f" ({self.at})" if self.at else "")

    def to_json(self) -> dict[str, Any]:
        share = {"share": self.count / self.n, "ci95": wilson(self.count, self.n), "n": self.n}
        return share | ({"at": self.at} if self.at else {})


@final
@dataclass(frozen=True)
class Number:
    """A measured number that is no share of images."""

    value: float
    unit: str = ""
    digits: int = 1

    def __str__(self) -> str:
        return f"{self.value:.{self.digits}f}{self.unit}"

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "unit": self.unit}


@final
@dataclass(frozen=True)
class Mean:
    """A mean over n images in percent, with half its 95 % interval (normal approximation)."""

    percent: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> "Mean":
        """The mean of one value between −1 and 1 per image."""
        n = len(values)
        spread = float(np.std(values, ddof=1)) if n > 1 else 0.0
        return cls(100 * float(np.mean(values)), 100 * 1.96 * spread / n**0.5, n)

    def __str__(self) -> str:
        return f"{self.percent:.1f} ±{self.half:.1f}"

    def to_json(self) -> dict[str, Any]:
        low, high = ((self.percent + sign * self.half) / 100 for sign in (-1, 1))
        return {"mean": self.percent / 100, "ci95": (low, high), "n": self.n}


@final
@dataclass(frozen=True)
class NotRun:
    """A cell without a measurement, and the cost of one."""

    what: str

    def __str__(self) -> str:
        return self.what

    def to_json(self) -> dict[str, Any]:
        return {"not_run": self.what}


Cell = Share | Mean | Number | NotRun | str


@final
@dataclass(frozen=True)
class Row:
    """One line of a table; a single ``NotRun`` stands for all its cells."""

    label: str
    cells: list[Cell]
    source: str = "ours"
    """``ours`` or ``paper``."""


@final
@dataclass(frozen=True)
class Table:
    """A table that ``certipatch reproduce`` prints and writes."""

    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    """Notes on data, n and differences from the paper, one line each."""
    figures: dict[str, bytes] = field(default_factory=dict)
    """PNG files by name."""
    name: str = ""
    title: str = ""

    def texts(self) -> list[list[str]]:
        """Label, source and cells of every row, as texts."""
        return [
            [row.label, row.source, *map(str, row.cells), *[""] * (len(self.columns) - len(row.cells))]
            for row in self.rows
        ]

    def markdown(self) -> str:
        """A Markdown table under its title, its notes below."""
        head = ["", "", *self.columns]
        lines = [head, ["---"] * len(head), *self.texts()]
        escaped = ("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"## {self.title}\n\n" + "\n".join(escaped) + "\n" + (f"{notes}\n" if notes else "")

    def csv(self) -> str:
        """Label, source, and per column its text; shares in percent with half their interval."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([["", "source", *self.columns], *self.texts()])
        return file.getvalue()

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "label": row.label,
                "source": row.source,
                "cells": [cell if isinstance(cell, str) else cell.to_json() for cell in row.cells],
            }
            for row in self.rows
        ]
        return {"name": self.name, "title": self.title, "columns": self.columns, "rows": rows, "notes": self.notes}
