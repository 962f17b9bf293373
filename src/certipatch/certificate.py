"""The one result type: the label, and the margin by which no patch can change it."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from certipatch.threats import Threat
from certipatch.views.incidence import Incidence, rectangles

Notion = Literal["recovery", "detection"]


@final
@dataclass(frozen=True, eq=False)
class Certificate:
    """Labels of B images, each with a margin for every location of the threat.

    An image is certified when every margin is > 0; tolerances are already subtracted. A location that cannot be
    bounded has margin −inf.
    """

    label: Int64[Tensor, " B"]
    margin: Float64[Tensor, "B L"]
    threat: Threat
    theorem: str
    sees: Incidence | None = None
    """Coordinates of the L locations; None if the threat has no locations (sparse) or the network itself is bounded."""
    notion: Notion = "recovery"
    """``recovery``: the label stays; ``detection``: it stays or an alarm is raised."""
    alarm: Bool[Tensor, " B"] | None = None
    """Clean images that raise an alarm (detection only)."""
    confidence: float = 1.0
    """Exactly 1, or 1 − α if the certificate rests on samples."""

    @property
    def certified(self) -> Bool[Tensor, " B"]:
        """True if no location of the threat can change the answer."""
        return (self.margin > 0).all(1)

    @property
    def weakest(self) -> Int64[Tensor, " B"]:
        """The location of smallest margin (the first of several)."""
        return self.margin.argmin(1)

    def box(self, location: int) -> tuple[int, int, int, int] | None:
        """(top, left, height, width) in pixels of a location; of its first patch if there are several."""
        if self.sees is None or self.margin.shape[1] != len(self.sees.choices):
            return None
        return self.sees.locations.box(int(self.sees.choices[location, 0]))

    def map(self, picture: int) -> Float64[Tensor, "H W"]:
        """Vulnerability map: for each pixel the smallest margin over the locations that cover it, +inf if none does."""
        if self.sees is None or self.sees.choices.shape[1] != 1:
            raise ValueError(f"a map needs one location per place of one patch; {self.threat} has no such places")
        locations = self.sees.locations
        height, width = locations.image_size
        margin, result = self.margin[picture].cpu(), torch.full((height, width), torch.inf, dtype=torch.float64)
        for number, mask in enumerate(locations.masks):
            members = locations.shape == number
            corner = locations.top[members] * width + locations.left[members]
            places = torch.full((height * width,), torch.inf, dtype=torch.float64)
            places = places.scatter_reduce_(0, corner, margin[members], "amin").view(height, width)
            for top, bottom, left, right in rectangles(mask):
                # a rectangle covers (y, x) from the corners (y − bottom, y − top] x (x − right, x − left]
                padded = nn.functional.pad(places, (right - 1, 0, bottom - 1, 0), value=torch.inf)[None, None]
                down = nn.functional.max_pool2d(-padded, (bottom - top, 1), stride=1)
                covered = -nn.functional.max_pool2d(down, (1, right - left), stride=1)[0, 0]
                result = torch.minimum(result, covered[:height, :width])
        return result
