"""LaVAN: localized and visible noise towards a chosen class (Karmon, Zoran & Goldberg 2018, https://arxiv.org/abs/1801.02608).

Differences to the original: without ``--target`` every start takes another rival, the nearest first; gradients are scaled
to a largest entry of 1, since the paper's plain ones suit one network; through the defense, as all our attacks.
"""

from typing import ClassVar, final

import torch
from torch import Tensor

from certipatch.attacks.base import Attack, Notify, Outcome, Task, Victim
from certipatch.attacks.locate import noisy_starts
from certipatch.attacks.pool import Pool, climb


@final
class LaVAN(Attack):
    """Raises one chosen class and lowers the answer at once, along the gradient, not its sign; a rival per start."""

    name: ClassVar[str] = "lavan"
    starts: ClassVar[int] = 20
    steps: ClassVar[int] = 150

    def run(self, victim: Victim, task: Task, notify: Notify = lambda done: None) -> Outcome:
        starts = noisy_starts(victim, task)
        with torch.no_grad():
            leads = torch.cat([victim.leads(p, task.generator(0, -1)) for p in task.images.split(task.batch)]).cpu()
        rivals = leads.scatter(1, task.label.cpu()[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]

        def aim(pool: Pool, leads: Tensor) -> Tensor:
            own = task.label[pool.picture].to(leads.device)
            rival = rivals[pool.picture, pool.start % rivals.shape[1]].to(leads.device)
            if task.target is not None:
                rival = torch.full_like(rival, task.target)
            return (leads.gather(1, rival[:, None]) - leads.gather(1, own[:, None]))[:, 0]

        def move(pool: Pool, gradient: Tensor) -> None:
            inside = gradient * pool.mask
            largest = inside.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
            pool.paint = (pool.paint + 4 * task.step * inside / largest).clamp_(0, 1)

        return climb(Pool(victim, task, *starts, notify), move, aim)
