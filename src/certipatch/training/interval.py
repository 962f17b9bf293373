"""Training with interval bounds (Chiang et al. 2020, sections 4.1 to 4.3 and appendix A.3).

The loss is the cross entropy of −m, where m_k is the smallest lower bound of z_y − z_k that the strategy has looked at
(equations 12, 14, 18), and m_y = 0. With an interval that is a point it is that of the logits.

**Differences to the original.** Sparse bounds are the tighter ones of ``bounds.sparse``. Gradients go through the worst
places only, which is the same gradient at a fraction of the cost. Random places are shared by the pictures of a batch.
"""

from typing import final

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.bounds import Interval
from certipatch.bounds.propagate import Layout, layout, rivals_of
from certipatch.bounds.sparse import sparse_passed
from certipatch.bounds.worst import Places, block_margins, check_pools, margins_at, places, worst
from certipatch.models.unet import UNet
from certipatch.threats import PatchThreat
from certipatch.training.recipe import IntervalTraining

WATCHED = 250  # held-out pictures that are bounded together


def bound_loss(margins: Float[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Mean cross entropy of −m, whose true class has margin 0: log(1 + Σ_k exp(−m_k))."""
    return F.cross_entropy(F.pad(-margins, (1, 0)), margins.new_zeros(len(margins), dtype=torch.int64))


def worst_margins(
    layout: Layout,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    where: Places,
    strength: float,
    index: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "B R"]:
    """For each rival the smallest margin over all blocks of places, or over those of ``index``.

    Its gradient is that of the bounds of all places: the worst are searched without autograd, and only they, at most
    K − 1 for a picture, are bounded again with it.
    """
    with torch.no_grad():
        _, at = worst(layout.passage(), images, label, where, strength, index)
    return margins_at(layout.passage(), images, label, where, at, strength)


def drawn_places(predicted: Float[Tensor, "B K L"], count: int, noise: Float[Tensor, "B n L"]) -> Int64[Tensor, "B n"]:
    """For one label after the other a place, drawn by the softmax of minus its predicted margins.

    ``noise`` is uniform in (0, 1); the largest of values with Gumbel noise is a draw from their softmax.
    """
    labels = torch.arange(count, device=predicted.device) % predicted.shape[1]
    gumbel = -torch.log(-torch.log(noise.clamp(1e-30, 1 - 1e-7)))
    return (gumbel - predicted[:, labels]).argmax(2)


@final
class IntervalObjective(nn.Module):
    """The network with all else that is trained beside it, and the loss of a batch as ``forward``.

    Args:
        network: (B, C, H, W) → (B, K).
        settings: the recipe's ``interval``.
        picture: (C, H, W).
        classes: K.

    Errors: InputError where the network has layers without bounds, or the patch does not fit.
    """

    def __init__(self, network: nn.Module, settings: IntervalTraining, picture: tuple[int, int, int], classes: int):
        super().__init__()
        self.network, self.settings, self.classes = network, settings, classes
        self.layout = layout(network, picture)
        self.guide = UNet(picture[0], classes) if settings.strategy == "guided" else None
        self.places: Places | None = None
        if settings.strategy != "sparse":
            pooled = settings.pool if settings.strategy == "pooled" else ()
            self.places = places(PatchThreat(settings.patch), picture[1:], pooled)
            check_pools(self.layout.passage(), pooled)

    def forward(self, images: Tensor, target: Tensor, share: float, draw: torch.Generator) -> Tensor:
        """The loss of pictures after a share of the training: bounds in float32, the U-Net in the training's precision."""
        strength = self.settings.strength(share)
        guess = self.guide(images).float() if self.guide is not None else None
        with torch.autocast(images.device.type, enabled=False):
            loss = images.new_zeros(())
            if self.settings.strategy == "natural" or self.settings.clean_loss_weight > 0:
                weight = 1.0 if self.settings.strategy == "natural" else self.settings.clean_loss_weight
                loss = weight * F.cross_entropy(self.network(images), target)
            if self.settings.strategy == "natural":
                return loss
            if guess is not None:
                margins, error = self._guided(images, target, strength, guess, draw)
                return loss + bound_loss(margins) + error
            return loss + bound_loss(self._margins(images, target, share, draw))

    def _margins(self, images: Tensor, target: Tensor, share: float, draw: torch.Generator) -> Float[Tensor, "B R"]:
        strength = self.settings.strength(share)
        if self.places is None:
            return sparse_passed(self.layout.passage(), images, target, self.settings.pixels, strength)
        where = self.places = self.places.to(images.device)
        if self.settings.strategy == "random" and share < self.settings.all_start:
            index = torch.randperm(len(where), generator=draw)[: self.settings.sampled_locations].to(images.device)
            return worst_margins(self.layout, images, target, where, strength, index)
        return worst_margins(self.layout, images, target, where, strength)

    def _guided(
        self, images: Tensor, target: Tensor, strength: float, guess: Float[Tensor, "B K H W"], draw: torch.Generator
    ) -> tuple[Float[Tensor, "B R"], Float[Tensor, ""]]:
        """Margins at the places that the U-Net points at, and its squared error there (equations 15 to 18)."""
        assert self.places is not None
        where = self.places = self.places.to(images.device)
        count, passed = self.settings.sampled_locations, self.layout.passage()
        rows, columns = where.corners.to(images.device).T
        predicted = guess[:, :, rows, columns]
        noise = torch.rand(len(images), count, len(where), generator=draw).to(images.device)
        chosen = drawn_places(predicted.detach(), count, noise)
        picture = torch.arange(len(images), device=images.device).repeat_interleave(count)
        margins = block_margins(passed, images, target, where, picture, chosen.flatten(), strength)
        margins = margins.unflatten(0, (-1, count))
        rivals = rivals_of(target, self.classes)
        true = margins.new_zeros(len(images), count, self.classes)
        true = true.scatter(2, rivals[:, None].expand(-1, count, -1), margins.detach())
        seen = predicted.gather(2, chosen[:, None].expand(-1, self.classes, -1)).mT
        return margins.amin(1), F.mse_loss(seen, true)

    @torch.no_grad()
    def watch(self, images: Float[Tensor, "B C H W"], target: Int64[Tensor, " B"]) -> dict[str, float]:
        """Losses and accuracies with whole intervals at every place: in the precision of the training, unguarded."""
        passed, sums_of_parts = self.layout.passage(), []
        for some, own in zip(images.split(WATCHED), target.split(WATCHED), strict=True):
            logits = passed.values(Interval(some, some))[-1].lower
            if self.places is None:
                margins = sparse_passed(passed, some, own, self.settings.pixels)
            else:
                where = self.places = self.places.to(some.device)
                margins, _ = worst(passed, some, own, where)
            right, certified = logits.argmax(1) == own, (margins > 0).all(1)
            sums = [F.cross_entropy(logits, own) * len(own), bound_loss(margins) * len(own)]
            sums_of_parts.append([*(s.item() for s in sums), int(right.sum()), int((right & certified).sum())])
        names = ("clean_loss", "bound_loss", "clean_accuracy", "certified_accuracy")
        return {
            name: sum(column) / len(images)
            for name, column in zip(names, zip(*sums_of_parts, strict=True), strict=True)
        }

    def parameter_groups(self) -> list[dict[str, object]]:
        """For the optimizer: the network's, and the U-Net's with a rate of its own."""
        groups: list[dict[str, object]] = [{"params": list(self.network.parameters()), "scale": 1.0}]
        if self.guide is not None:
            groups.append({"params": list(self.guide.parameters()), "scale": self.settings.guide_rate})
        return groups
