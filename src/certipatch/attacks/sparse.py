"""Sparse PGD: any k pixels (PGD₀ of Croce & Hein 2019, https://arxiv.org/abs/1909.05040).

Differences to the original: which k pixels are kept is decided by what each gains to first order, held over the last
steps, not by the size of the change, which a sign step makes equal everywhere; the loss is that of the defense.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from certipatch.attacks.base import Attack, Notify, Outcome, Task, Victim
from certipatch.attacks.pool import Pool, climb
from certipatch.errors import InputError
from certipatch.threats import SparseThreat, Threat


@final
class Sparse(Attack):
    """Any K pixels, chosen anew at every step by their gain."""

    name: ClassVar[str] = "sparse"
    starts: ClassVar[int] = 10
    steps: ClassVar[int] = 100

    def check(self, threat: Threat | None) -> None:
        if not isinstance(threat, SparseThreat):
            raise InputError("sparse paints any K pixels: give --sparse K, or use --attack patch-pgd")

    def run(self, victim: Victim, task: Task, notify: Notify = lambda done: None) -> Outcome:
        victim.check_gradients(task.images)
        assert isinstance(task.threat, SparseThreat)
        number = task.threat.pixels
        height, width = task.images.shape[2:]
        if number > height * width:
            raise InputError(f"{task.threat} are more than a picture of {height}x{width} pixels has")

        def begin(picture: int, start: int):
            generator = task.generator(picture, start)
            noise = torch.rand(task.images.shape[1:], generator=generator)
            gain = torch.rand((1, height, width), generator=generator)
            return noise, largest(gain[None], number)[0], torch.full((1,), -1)

        def move(pool: Pool, gradient: Tensor) -> None:
            images = task.images[pool.picture]
            away = torch.where(pool.mask, gradient * (pool.paint - images), 0.0).sum(1, keepdim=True)
            ahead = torch.maximum(gradient * (1 - images), -gradient * images).sum(1, keepdim=True)
            painted = (pool.paint + 4 * task.step * gradient.sign()).clamp_(0, 1)
            best = (gradient > 0).to(images)
            moved = largest(torch.where(pool.mask, torch.maximum(away, ahead), ahead), number)
            turn = (pool.age % 3 == 0).view(-1, 1, 1, 1).to(moved.device)  # every third step other pixels
            mask = torch.where(turn, moved, pool.mask)
            pool.paint = torch.where(mask & ~pool.mask, best, painted)
            pool.mask = mask

        return climb(Pool(victim, task, begin, 0, [task.starts] * len(task.images), notify), move)


def largest(gain: Float[Tensor, "N 1 H W"], number: int) -> Bool[Tensor, "N 1 H W"]:
    """True on the ``number`` pixels of largest gain."""
    chosen = gain.flatten(1).topk(number, 1).indices
    return torch.zeros_like(gain, dtype=torch.bool).flatten(1).scatter_(1, chosen, True).view_as(gain)
