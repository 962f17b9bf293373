"""The pool: pairs of picture and start, as many as one gradient takes, each replaced as soon as it is done with.

A start is done after its last step; all starts of a picture are done as soon as one has broken it. So batches stay
full while easy images fall early and hard ones take all their starts. A plain attack, whose victim is a network behind a
defense that it does not know of, takes whole starts until the network falls; then the defense answers to its best picture.
"""

from collections.abc import Callable, Iterator
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from certipatch.attacks.base import Answer, Notify, Outcome, Task, Victim
from certipatch.attacks.clean_views import CleanViews

EVERY = 10  # steps after which the victim is asked although the loss does not say that it fell
Begin = Callable[
    [int, int], tuple[Tensor, Tensor, Tensor]
]  # picture, start → paint (C H W), mask (1 H W), locations (count,)


@final
class Pool:
    """Rows under attack, and the outcome so far.

    paint: (R, C, H, W), what the attacker would paint, everywhere. mask: (R, 1, H, W), where he may. picture, start,
    age: of each row. A row's picture is ``where(mask, paint, image)``: outside of the mask nothing can change.

    Args:
        begin: the first paint, mask and locations of a start.
        starts: number of starts of every picture.
        count: locations of one choice; 0 for attacks without.
        skip: images that are left alone.
    """

    def __init__(
        self,
        victim: Victim,
        task: Task,
        begin: Begin,
        count: int,
        starts: list[int],
        notify: Notify,
        steps: int | None = None,
        skip: Bool[Tensor, " B"] | None = None,
    ):
        self.victim, self.task, self._begin, self._notify = victim, task, begin, notify
        self.steps = task.steps if steps is None else steps
        number, images = len(task.images), task.images
        self.generator = task.generator(0, -1)
        self._clean = CleanViews.of(victim, task)
        self.outcome = Outcome(
            broken=torch.zeros(number, dtype=torch.bool),
            attacked=images.clone(),
            label=task.label.clone(),
            alarm=torch.zeros(number, dtype=torch.bool),
            loss=torch.full((number,), -torch.inf),
            choice=torch.full((number, max(count, 1)), -1),
            tried=[set() for _ in range(number)],
            violated=[set() for _ in range(number)],
        )
        self._left = [0 if skip is not None and bool(skip[b]) else starts[b] for b in range(number)]
        self._done = sum(left == 0 for left in self._left)
        order = ((b, s) for s in range(max(starts, default=0)) for b in range(number) if s < self._left[b])
        self._queue: Iterator[tuple[int, int]] = iter(list(order))
        empty = torch.zeros(0, dtype=torch.int64)
        self.picture, self.start, self.age = empty, empty, empty
        self.paint = images[:0].clone()
        self.mask = torch.zeros((0, 1, *images.shape[2:]), dtype=torch.bool, device=images.device)
        self.choice = torch.zeros((0, max(count, 1)), dtype=torch.int64)
        notify(self._done)

    def refill(self) -> bool:
        """Fill free rows with the next starts; False when there is nothing left to do."""
        rows: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
        while len(rows) + len(self.picture) < self.task.batch:
            pair = next(self._queue, None)
            if pair is None:
                break
            if not self.outcome.broken[pair[0]]:
                rows.append((*pair, *self._begin(*pair)))
        if rows:
            pictures, starts, paints, masks, choices = zip(*rows, strict=True)
            self.picture = torch.cat([self.picture, torch.tensor(pictures)])
            self.start = torch.cat([self.start, torch.tensor(starts)])
            self.age = torch.cat([self.age, torch.zeros(len(rows), dtype=torch.int64)])
            self.paint = torch.cat([self.paint, torch.stack(paints).to(self.paint)])
            self.mask = torch.cat([self.mask, torch.stack(masks).to(self.mask.device)])
            self.choice = torch.cat([self.choice, torch.stack(choices)])
        return len(self.picture) > 0

    def images(self) -> Float[Tensor, "R C H W"]:
        """The attacked images of all rows."""
        return torch.where(self.mask, self.paint, self.task.images[self.picture])

    def leads(self, images: Float[Tensor, "R C H W"]) -> Float[Tensor, "R K"]:
        """The victim's leads for the rows' images; views that no mask reaches are not computed again."""
        if self._clean is None:
            return self.victim.leads(images, self.generator)
        return self._clean.leads(images, self.picture, self.mask)

    def loss(self, leads: Float[Tensor, "R K"]) -> Float[Tensor, " R"]:
        """Compute the objective of the attack, for each row."""
        return self.task.loss(leads, self.picture)

    def settle(self, images: Float[Tensor, "R C H W"], loss: Float[Tensor, " R"]) -> Bool[Tensor, " R"]:
        """Ask the victim where a row may have succeeded, keep the best of each picture; then rows are a step older.

        Gives the rows that stay; the pool itself keeps only those.
        """
        loss = loss.detach().float().cpu()
        self._keep_best(images, loss)
        last = self.age >= self.steps
        ask = (loss > 0) | last | (self.age % EVERY == EVERY - 1)
        if not self.victim.adaptive:  # a start ends before anybody looks, and only at the bare network
            fell = self.picture[last]
            self.outcome.broken[fell] = self.outcome.loss[fell] > 0
        elif bool(ask.any()):
            rows = ask.nonzero().flatten()
            self._ask(images[rows], self.picture[rows], self.choice[rows])
        self.outcome.queries += len(self.picture)
        stay = ~last & ~self.outcome.broken[self.picture]
        for b in self.picture[last | self.outcome.broken[self.picture]].tolist():
            self._finish(b)
        for b, place in zip(self.picture[last].tolist(), self.choice[last, 0].tolist(), strict=True):
            self.outcome.tried[b].add(place)
        self.age = self.age + 1
        self._take(stay)
        return stay

    def _keep_best(self, images: Float[Tensor, "R C H W"], loss: Float[Tensor, " R"]) -> None:
        outcome = self.outcome
        for row in (loss > outcome.loss[self.picture]).nonzero().flatten().tolist():
            b = int(self.picture[row])
            if loss[row] > outcome.loss[b] and not outcome.broken[b]:
                outcome.loss[b], outcome.attacked[b], outcome.choice[b] = (
                    loss[row],
                    images[row].detach(),
                    self.choice[row],
                )

    def _ask(
        self, images: Float[Tensor, "r C H W"], pictures: Int64[Tensor, " r"], choices: Int64[Tensor, "r n"]
    ) -> Answer:
        """Record the victim's answers to attacked images."""
        answer = self.victim.answer(images.detach())
        task, outcome = self.task, self.outcome
        label, alarm = answer.label.cpu(), answer.alarm.cpu()
        changed = (label != task.label.cpu()[pictures]) & ~alarm
        success = changed if task.target is None else (label == task.target) & ~alarm
        for i in changed.nonzero().flatten().tolist():
            b = int(pictures[i])
            if task.margins is not None and self._guarded(b, choices[i]):
                outcome.violated[b].add(int(choices[i, 0]))
            elif not success[i] or outcome.broken[b]:
                continue
            outcome.broken[b], outcome.attacked[b], outcome.choice[b] = True, images[i].detach(), choices[i]
            outcome.label[b], outcome.alarm[b] = label[i], alarm[i]
        return Answer(label, alarm)

    def finish(self) -> Outcome:
        """The outcome, with the victim's answers to the best images of those that stand.

        A plain attack never asked it before: there all images are decided here.
        """
        outcome = self.outcome
        if not self.victim.adaptive:
            outcome.broken.zero_()
        standing = (~outcome.broken).nonzero().flatten()
        for part in standing.split(max(1, self.task.batch)):
            if len(part):
                answer = self._ask(outcome.attacked[part], part, outcome.choice[part])
                outcome.label[part], outcome.alarm[part] = answer.label, answer.alarm
        return outcome

    def _guarded(self, b: int, choice: Tensor) -> bool:
        """Test if a theorem says that nothing painted there can change the answer."""
        margins = self.task.margins
        assert margins is not None
        if margins.shape[1] == 1 or len(choice) > 1:
            return bool((margins[b] > 0).all())
        return bool(choice[0] >= 0) and bool(margins[b, choice[0]] > 0)

    def _finish(self, b: int) -> None:
        if self._left[b] > 0:
            self._left[b] = 0 if self.outcome.broken[b] else self._left[b] - 1
            if self._left[b] == 0:
                self._done += 1
                self._notify(self._done)

    def _take(self, stay: Bool[Tensor, " R"]) -> None:
        if not bool(stay.all()):
            self.picture, self.start, self.age = self.picture[stay], self.start[stay], self.age[stay]
            self.paint, self.mask, self.choice = self.paint[stay], self.mask[stay], self.choice[stay]


def climb(
    pool: Pool, move: Callable[[Pool, Tensor], None], aim: Callable[[Pool, Tensor], Tensor] | None = None
) -> Outcome:
    """Gradient ascent on all rows until the pool is empty.

    Args:
        move: changes ``pool.paint`` (and ``mask``), given the gradient of the loss at every pixel of the picture.
        aim: loss of every row from the leads (R, K), where it is not the pool's own.
    """
    while pool.refill():
        images = pool.images().detach().requires_grad_()
        with torch.enable_grad():
            leads = pool.leads(images)
            loss = pool.loss(leads)
            (gradient,) = torch.autograd.grad((loss if aim is None else aim(pool, leads)).sum(), images)
        stay = pool.settle(images, loss)
        move(pool, gradient[stay])
    return pool.finish()
