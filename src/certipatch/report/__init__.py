"""Reports: what a run found, as one self-contained HTML page."""

from certipatch.report.assemble import of_run, shown_pictures
from certipatch.report.document import page
from certipatch.report.places import Places, places
from certipatch.report.shown import Shown

__all__ = ["Places", "Shown", "of_run", "page", "places", "shown_pictures"]
