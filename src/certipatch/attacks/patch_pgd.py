"""Patch PGD: the iterative sign method on a patch, with random starts (Chiang et al. 2020, https://arxiv.org/abs/2003.06693).

Differences to the original: locations are searched too, not only drawn at random (``--search``); the loss is the lead of a
wrong class under the defense itself (``losses``), not the network's cross-entropy; an image that fell takes no further
starts; rows of all images and starts share one batch.
"""

from typing import ClassVar, final

from torch import Tensor

from certipatch.attacks.base import Attack, Notify, Outcome, Task, Victim
from certipatch.attacks.locate import noisy_starts
from certipatch.attacks.pool import Pool, climb


@final
class PatchPGD(Attack):
    """Gradient sign steps on the patch, random starts, locations by search; the paper's 80 x 150 steps of 0.05."""

    name: ClassVar[str] = "patch-pgd"
    starts: ClassVar[int] = 80
    steps: ClassVar[int] = 150

    def run(self, victim: Victim, task: Task, notify: Notify = lambda done: None) -> Outcome:
        def move(pool: Pool, gradient: Tensor) -> None:
            pool.paint = (pool.paint + task.step * gradient.sign()).clamp_(0, 1)

        return climb(Pool(victim, task, *noisy_starts(victim, task), notify), move)
