"""Reports: the results of a run as one self-contained HTML page."""

from certipatch.report.assemble import of_run, shown_pictures
from certipatch.report.attack_page import of_attack
from certipatch.report.certify_page import CertifyPage
from certipatch.report.document import page
from certipatch.report.images import ReportImage
from certipatch.report.places import Places, places
from certipatch.report.rebuild import rebuild

__all__ = ["CertifyPage", "Places", "ReportImage", "of_attack", "of_run", "page", "places", "rebuild", "shown_pictures"]
