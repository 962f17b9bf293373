"""Square attack on patches: random search without gradients (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).

With moves of the patch as in Sparse-RS (Croce et al. 2022, https://arxiv.org/abs/2006.12834): most steps repaint a square
inside the patch with a corner of the colour cube, some move the patch; what does not raise the loss is taken back. The
first paint is vertical stripes. Differences to the originals: the squares shrink by one formula, and a patch moves less
far as the search goes on.
"""

import math
from typing import ClassVar, final

import torch
from torch import Generator, Tensor

from certipatch.attacks.base import Attack, Notify, Outcome, Task, Victim
from certipatch.attacks.locate import plan
from certipatch.attacks.places import Places
from certipatch.attacks.pool import Pool

SHARE = 0.4  # of the patch that the first squares cover
MOVES = 5  # every which step moves the patch


@final
class Square(Attack):
    """Random search, needs no gradients: repaints squares of the patch and moves it; for ONNX models too."""

    name: ClassVar[str] = "square"
    gradients: ClassVar[bool] = False
    starts: ClassVar[int] = 5
    steps: ClassVar[int] = 500

    def run(self, victim: Victim, task: Task, notify: Notify = lambda done: None) -> Outcome:
        places = task.places()
        drawn = [places.draw(task.starts, task.generator(b, -1)) for b in range(len(task.images))]
        chosen = drawn if task.search == "auto" else plan(victim, task, places)
        roams = task.search in ("auto", "random")
        masks = [places.masks(choice) for choice in chosen]
        channels, height, width = task.images.shape[1:]
        draws: dict[tuple[int, int], Generator] = {}  # of each start, so that nothing hangs on the batch it comes in

        def begin(picture: int, start: int):
            generator = draws[picture, start] = task.generator(picture, start)
            stripes = torch.randint(0, 2, (channels, 1, width), generator=generator).float()
            return stripes.expand(-1, height, -1), masks[picture][start], chosen[picture][start]

        pool = Pool(victim, task, begin, places.count, [len(choice) for choice in chosen], notify)
        kept: dict[tuple[int, int], float] = {}
        while pool.refill():
            rows = list(zip(pool.picture.tolist(), pool.start.tolist(), strict=True))
            before = pool.paint, pool.mask, pool.choice
            pool.paint, pool.mask, pool.choice = self._proposed(pool, places, roams, [draws[row] for row in rows])
            images = pool.images()
            with torch.no_grad():
                loss = pool.loss(pool.leads(images)).float()
            better = torch.tensor([kept.get(row, -math.inf) for row in rows]) < loss.cpu()
            stay = pool.settle(images, loss)
            accepted = zip(rows, better.tolist(), loss.tolist(), strict=True)
            kept |= {row: value for row, raised, value in accepted if raised}
            back = ~better[stay]
            wide = back.view(-1, 1, 1, 1).to(pool.paint.device)
            pool.paint = torch.where(wide, before[0][stay], pool.paint)
            pool.mask = torch.where(wide, before[1][stay], pool.mask)
            pool.choice = torch.where(back[:, None], before[2][stay], pool.choice)
        return pool.finish()

    def _proposed(
        self, pool: Pool, places: Places, roams: bool, draws: list[Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every row repainted, or moved, as its generator draws; rows of age 0 as they are."""
        paint, choice = pool.paint.clone(), pool.choice.clone()
        locations, moved = places.locations, []
        for row, (age, generator) in enumerate(zip(pool.age.tolist(), draws, strict=True)):
            if age == 0:
                continue
            one = int(torch.randint(places.count, (1,), generator=generator))
            place = int(choice[row, one])
            top, left, height, width = locations.box(place)
            if roams and age % MOVES == 0:
                reach = max(1, round(max(locations.image_size) * (1 - age / max(1, pool.steps)) / 2))
                near = places.near(place, reach)
                choice[row, one] = near[int(torch.randint(len(near), (1,), generator=generator))]
                new_top, new_left = locations.box(int(choice[row, one]))[:2]
                content = paint[row, :, top : top + height, left : left + width].clone()
                paint[row, :, new_top : new_top + height, new_left : new_left + width] = content
                moved.append(row)
                continue
            share = SHARE * 0.5 ** (8 * age / max(1, pool.steps))
            side = max(1, round(math.sqrt(share * height * width)))
            down, across = min(side, height), min(side, width)
            y = top + int(torch.randint(height - down + 1, (1,), generator=generator))
            x = left + int(torch.randint(width - across + 1, (1,), generator=generator))
            colour = torch.randint(0, 2, (paint.shape[1], 1, 1), generator=generator).to(paint)
            paint[row, :, y : y + down, x : x + across] = colour
        mask = pool.mask
        if moved:
            mask = mask.clone()
            mask[moved] = places.masks(choice[moved]).to(mask.device)
        return paint, mask, choice
