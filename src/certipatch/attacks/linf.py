"""Projected gradient descent within an L∞ ball (Madry et al. 2018, https://arxiv.org/abs/1706.06083), for the side question.

No theorem here is about it: it shows what certificates against patches do not say. Differences to the original: the loss
is that of the defense (``losses``), and an image that fell takes no further restarts.
"""

from typing import ClassVar, final

import torch
from torch import Tensor

from certipatch.attacks.base import Attack, Notify, Outcome, Task, Victim
from certipatch.attacks.pool import Pool, climb
from certipatch.errors import InputError
from certipatch.threats import Threat


@final
class LInf(Attack):
    """Every value of the image changed by up to --epsilon; nothing is certified against it."""

    name: ClassVar[str] = "linf"
    starts: ClassVar[int] = 5
    steps: ClassVar[int] = 50

    def check(self, threat: Threat | None) -> None:
        if threat is not None:
            raise InputError("linf changes every pixel: give --epsilon in place of a patch, or use --attack patch-pgd")

    def run(self, victim: Victim, task: Task, notify: Notify = lambda done: None) -> Outcome:
        victim.check_gradients(task.images)
        whole = torch.ones((1, *task.images.shape[2:]), dtype=torch.bool)
        low, high = (task.images - task.epsilon).clamp(min=0), (task.images + task.epsilon).clamp(max=1)
        step = step_size(task.epsilon, task.steps)

        def begin(picture: int, start: int):
            noise = torch.rand(task.images.shape[1:], generator=task.generator(picture, start)).to(task.images)
            nowhere = torch.full((1,), -1)
            return low[picture] + noise * (high[picture] - low[picture]), whole, nowhere

        def move(pool: Pool, gradient: Tensor) -> None:
            moved = pool.paint + step * gradient.sign()
            pool.paint = torch.minimum(torch.maximum(moved, low[pool.picture]), high[pool.picture])

        return climb(Pool(victim, task, begin, 0, [task.starts] * len(task.images), notify), move)


def step_size(epsilon: float, steps: int) -> float:
    """A tenth of ε, or more if so few steps could not cross the ball."""
    return epsilon * max(0.1, 2.5 / max(1, steps))
