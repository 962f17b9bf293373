"""Predictions of views that a patch does not touch are those of the clean image, and are computed once.

A band of 4 columns of 32 sees a 5x5 patch in 8 of 32 places: a gradient through the other 24 would be zero.
"""

from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from certipatch import evidence as ev
from certipatch.attacks.base import Task, Victim
from certipatch.defenses.base import ViewDefense
from certipatch.inference import batch_size_for
from certipatch.views import Views
from certipatch.views.render import image_size, render_each

SMALL = 0.5  # views that show more of an image than this are all computed


@final
class CleanViews:
    """A defense's logits for the views of clean images, from which those of attacked ones differ where a mask is."""

    def __init__(self, victim: Victim, views: Views, shown: Bool[Tensor, "V H W"], task: Task):
        self._victim, self._defense = victim, victim.defense
        self._views, self._size = views, (shown.shape[1], shown.shape[2])
        self._shown = shown.flatten(1).to(task.images)  # (V, H·W)
        with torch.no_grad(), victim.passes(task.images):
            parts = [
                ev.differentiable_logits(self._defense.model, views, part) for part in task.images.split(task.batch)
            ]
        self._logits = torch.cat(parts)

    @classmethod
    def of(cls, victim: Victim, task: Task) -> "CleanViews | None":
        """None if the victim's leads do not come from the logits of small views, each of which is a pass."""
        defense, size = victim.defense, image_size(task.images)
        if not victim.adaptive or not isinstance(defense, ViewDefense):
            return None
        own = type(defense).leads is ViewDefense.leads
        if not own or getattr(defense.model, "encoding", "null") == "all-views":
            return None
        views = defense.views_of(size)
        shown = views.visible(size)
        return cls(victim, views, shown, task) if shown.double().mean() < SMALL else None

    def leads(
        self, images: Float[Tensor, "R C H W"], picture: Int64[Tensor, " R"], mask: Bool[Tensor, "R 1 H W"]
    ) -> Float[Tensor, "R K"]:
        """Leads of images that differ from clean ``picture`` under ``mask`` alone; differentiable."""
        touched = (mask.flatten(1).to(self._shown) @ self._shown.T > 0).nonzero()
        step = batch_size_for(max(1, int(self._shown.sum(1).max())))
        parts = touched.split(step)
        with self._victim.passes(images):
            if len(parts) == 1 or not images.requires_grad:
                answers = [self._answers(images, part) for part in parts]
            else:  # to save memory: computed again on the way back
                answers = [checkpoint(self._answers, images, part, use_reentrant=False) for part in parts]
        logits = self._logits[picture]
        changed = torch.cat([part for part in answers if isinstance(part, Tensor)]).to(logits.dtype)
        logits = logits.index_put((touched[:, 0], touched[:, 1]), changed)
        return self._defense.leads_of_logits(logits, self._size)

    def _answers(self, images: Float[Tensor, "R C H W"], pairs: Int64[Tensor, "n 2"]) -> Float[Tensor, "n K"]:
        model = self._defense.model
        encoding, fill = getattr(model, "encoding", "null"), getattr(model, "fill", 0.5)
        return model(render_each(encoding, images[pairs[:, 0]], self._views, pairs[:, 1], fill))
