"""The universal patch: one for all images, turned and scaled (Brown et al. 2017, https://arxiv.org/abs/1712.09665).

It is learned once, from the first images of the run, over random locations, rotations and scales; then it is put on every
image, at many locations and in many poses. Differences to the original: untargeted unless there is a ``--target``; the
patch fills the threat's own shape at each location, so that it never leaves the threat; through the defense.
"""

import math
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from certipatch.attacks.base import Attack, Notify, Outcome, Task, Victim
from certipatch.attacks.locate import plan
from certipatch.attacks.places import Places
from certipatch.attacks.pool import Pool

ANGLE, SCALE = math.pi / 4, (0.8, 1.25)
LEARNING = 200  # images per gradient while it is learned


@final
class Universal(Attack):
    """One patch for all images, learned on the first of them, over locations, rotations and scales; steps of learning."""

    name: ClassVar[str] = "universal"
    starts: ClassVar[int] = 20
    steps: ClassVar[int] = 200

    def prepare(self, victim: Victim, task: Task) -> Float[Tensor, "C S S"]:
        places = task.places()
        side = max(max(len(mask), len(mask[0])) for mask in places.locations.masks)
        generator = task.generator(0, -3)
        patch = torch.rand((task.images.shape[1], side, side), generator=generator).to(task.images)
        if task.steps:
            victim.check_gradients(task.images)
        number = min(LEARNING, task.batch, len(task.images))
        for _ in range(task.steps):
            rows = torch.randperm(len(task.images), generator=generator)[:number]
            choice = torch.randint(len(places), (number, places.count), generator=generator)
            pose = poses(number, generator)
            patch.requires_grad_()
            with torch.enable_grad():
                images = worn(patch, task.images[rows], choice, pose, places)
                leads = victim.leads(images, generator)
                loss = task.loss(leads, rows)
                (gradient,) = torch.autograd.grad(loss.clamp(max=2.0).sum(), patch)
            patch = (patch.detach() + task.step * gradient.sign()).clamp(0, 1)
        return patch.detach()

    def run(self, victim: Victim, task: Task, notify: Notify = lambda done: None) -> Outcome:
        places = task.places()
        patch = self.prepare(victim, task) if task.prepared is None else task.prepared.to(task.images)
        search = [places.draw(task.starts, task.generator(b, -1)) for b in range(len(task.images))]
        chosen = search if task.search in ("auto", "random") else plan(victim, task, places)
        masks = [places.masks(choice) for choice in chosen]

        def begin(picture: int, start: int):
            pose = poses(1, task.generator(picture, start))
            choice = chosen[picture][start]
            attacked = worn(patch, task.images[picture : picture + 1], choice[None], pose, places)[0]
            return attacked, masks[picture][start], choice

        pool = Pool(victim, task, begin, places.count, [len(choice) for choice in chosen], notify, steps=0)
        while pool.refill():
            images = pool.images()
            with torch.no_grad():
                loss = pool.loss(pool.leads(images))
            pool.settle(images, loss)
        return pool.finish()


def poses(number: int, generator: torch.Generator) -> Float[Tensor, "N 2"]:
    """Random angles, in radians, and scales."""
    drawn = torch.rand((number, 2), generator=generator)
    return torch.stack([ANGLE * (2 * drawn[:, 0] - 1), SCALE[0] * (SCALE[1] / SCALE[0]) ** drawn[:, 1]], 1)


def worn(
    patch: Float[Tensor, "C S S"],
    images: Float[Tensor, "N C H W"],
    choice: Tensor,
    pose: Float[Tensor, "N 2"],
    places: Places,
) -> Float[Tensor, "N C H W"]:
    """Images with the patch, turned and scaled about the middle of each location; beyond its edge its border goes on."""
    height, width = images.shape[2:]
    result = images
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for number in range(places.count):
        boxes = torch.tensor([places.locations.box(int(place)) for place in choice[:, number]]).float()
        y = (rows - boxes[:, 0, None] - boxes[:, 2, None] / 2) / (boxes[:, 2, None] / 2)
        x = (columns - boxes[:, 1, None] - boxes[:, 3, None] / 2) / (boxes[:, 3, None] / 2)
        cos, sin = (pose[:, 0].cos() / pose[:, 1])[:, None, None], (pose[:, 0].sin() / pose[:, 1])[:, None, None]
        across = cos * x[:, None] + sin * y[:, :, None]
        down = cos * y[:, :, None] - sin * x[:, None]
        grid = torch.stack([across, down], 3).to(images)
        shown = F.grid_sample(
            patch.expand(len(images), -1, -1, -1), grid, "bilinear", padding_mode="border", align_corners=False
        )
        mask = places.masks(choice[:, number : number + 1]).to(images.device)
        result = torch.where(mask, shown.clamp(0, 1), result)
    return result
