"""The page of the user's own images; it grows while images are certified."""

from typing import Any, final

from certipatch.report.assemble import shown_pictures
from certipatch.report.document import page
from certipatch.report.images import ReportImage
from certipatch.report.places import Places, places
from certipatch.runs.certify import CertifiedBatch

MAX_SHOWN = 400  # images in the report of certify


@final
class CertifyPage:
    """Up to MAX_SHOWN certified images, and the places of the threat."""

    def __init__(self) -> None:
        self.shown: list[ReportImage] = []
        self.places: Places | None = None

    def add(self, batch: CertifiedBatch) -> None:
        """Show images of a batch, while there is room."""
        if len(self.shown) >= MAX_SHOWN:
            return
        card, certificate = batch.card, batch.certificate
        self.places = self.places or places(batch.defense, certificate, card.image_size, card.classes)
        pixels = (batch.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        titles = [path.name for path in batch.paths]
        self.shown += shown_pictures(
            pixels, titles, certificate, batch.evidence, self.places, card.classes, batch.largest, None
        )

    def page(self, config: dict[str, Any], summary: dict[str, Any]) -> str:
        """The page as HTML."""
        return page(config, summary, None, self.shown[:MAX_SHOWN], self.places)
