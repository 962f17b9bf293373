"""The locations that a patch threat allows: numbered, for one patch, and the pixels of any choice of them."""

from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor
from torch.nn import functional as F

from certipatch.threats import PatchThreat


@final
class Places:
    """The L locations of one patch of ``threat`` in images of (H, W) pixels, numbered as in ``threat.locations``.

    A *choice* is one location for each of the threat's ``count`` patches; they may overlap.

    Errors: InputError if the patch does not fit the image.
    """

    def __init__(self, threat: PatchThreat, image_size: tuple[int, int]):
        self.locations = threat.locations(image_size)
        self.count, self.image_size = threat.count, image_size
        self._shapes = [torch.tensor(mask) for mask in self.locations.masks]
        most = max(int(mask.sum()) for mask in self._shapes)
        width = image_size[1]
        steps = []
        for mask in self._shapes:  # a patch's pixels relative to its corner, the first repeated to one length
            down, right = mask.nonzero().T
            offsets = down * width + right
            steps.append(torch.cat([offsets, offsets[:1].expand(most - len(offsets))]))
        self._offsets = torch.stack(steps)
        self._corner = self.locations.top * width + self.locations.left

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def side(self) -> int:
        """The shortest side of a patch in pixels."""
        return min(min(mask.shape) for mask in self._shapes)

    def draw(self, number: int, generator: Generator) -> Int64[Tensor, "number count"]:
        """Random choices; of single patches no location comes again before all others have come."""
        if self.count > 1:
            return torch.randint(len(self), (number, self.count), generator=generator)
        rounds = -(-number // len(self))
        order = [torch.randperm(len(self), generator=generator) for _ in range(rounds)]
        return torch.cat([*order, torch.zeros(0, dtype=torch.int64)])[:number, None]

    def masks(self, choice: Int64[Tensor, "N count"]) -> Bool[Tensor, "N 1 H W"]:
        """True on the pixels that the patches of each choice cover."""
        height, width = self.image_size
        pixels = self._corner[choice][..., None] + self._offsets[self.locations.shape[choice]]
        covered = torch.zeros((len(choice), height * width), dtype=torch.bool)
        return covered.scatter_(1, pixels.flatten(1), True).view(-1, 1, height, width)

    def sums(self, maps: Float[Tensor, "N H W"]) -> Float[Tensor, "N L"]:
        """The sum of a map over the pixels of every location."""
        window_sums = torch.empty((len(maps), len(self)), dtype=maps.dtype, device=maps.device)
        for number, mask in enumerate(self._shapes):
            members = (self.locations.shape == number).nonzero().flatten()
            whole = F.conv2d(maps[:, None], mask.to(maps)[None, None])[:, 0]
            window_sums[:, members] = whole[:, self.locations.top[members], self.locations.left[members]]
        return window_sums

    def near(self, place: int, distance: int) -> Int64[Tensor, " n"]:
        """Places of the same shape whose corner lies within ``distance`` pixels, down and across; itself among them."""
        here = self.locations
        close = (here.top - here.top[place]).abs() <= distance
        close &= (here.left - here.left[place]).abs() <= distance
        return (close & (here.shape == here.shape[place])).nonzero().flatten()
