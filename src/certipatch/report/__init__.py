"""Reports: what a run found, as one self-contained HTML page."""

from certipatch.report.assemble import of_run, shown_picture
from certipatch.report.document import page
from certipatch.report.shown import Shown

__all__ = ["Shown", "of_run", "page", "shown_picture"]
