"""Matplotlib figures in one style: readable in print and in every common colour blindness, the same bytes every time."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#56789A", "#8C6D00", "#000000")  # after Okabe & Ito, all dark
STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E0",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "savefig.dpi": 220.0,
    "svg.hashsalt": "certipatch",
    "pdf.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save figures in this style."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold letters that the font lacks
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as ``png``, ``pdf`` or ``svg``. The same figure gives the same bytes."""
    file = io.BytesIO()
    undated = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Producer": None}}
    with style():
        figure.savefig(file, format=kind, metadata=undated.get(kind, {"Software": None}))
    return file.getvalue()
