"""Patch PGD against mnist-plain on 32 pictures: all starts and pictures in one batch, one picture at a time, and ART's.

The same pictures, network, number of gradients and step. ART's adversarial patch learns one patch for a batch of pictures;
here it gets one picture at a time, at a random place for each step, as it is made for.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import certipatch as cp
from certipatch.attacks import Task, Victim, find
from certipatch.attacks.clean_views import CleanViews
from certipatch.defenses.undefended import Undefended

PICTURES, STARTS, STEPS = 32, 2, 10
GROUP = f"patch PGD, {PICTURES} pictures x {STARTS} starts x {STEPS} steps"


def attacked(batch: int = 256) -> tuple[Undefended, Task]:
    defense = cp.load("mnist-plain")
    assert isinstance(defense, Undefended)
    images = cp.data.load("fashion-sample", limit=PICTURES).images(range(PICTURES))
    label = defense.predict(images)
    threat = cp.PatchThreat(5)
    numbers = list(range(PICTURES))
    return defense, Task(images, label, threat, numbers, STARTS, STEPS, 0.2, "random", batch=batch)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.benchmark(group=GROUP)
def test_batched(benchmark, bf16) -> None:
    defense, task = attacked()
    exact = find("patch-pgd").run(Victim(defense), task).broken.sum()
    attack = partial(find("patch-pgd").run, Victim(defense, bf16=bf16), task)
    assert benchmark.pedantic(attack, rounds=3, iterations=1).broken.sum() >= exact


@pytest.mark.benchmark(group=GROUP)
def test_one_picture_at_a_time(benchmark) -> None:
    defense, task = attacked()
    together = find("patch-pgd").run(Victim(defense), task)

    def each() -> int:
        broken = 0
        for b in range(PICTURES):
            one = replace(task, images=task.images[[b]], label=task.label[[b]], numbers=[b], batch=1)
            broken += int(find("patch-pgd").run(Victim(defense), one).broken)
        return broken

    broken = benchmark.pedantic(each, rounds=1, iterations=1)
    assert int(together.broken.sum()) >= broken


@pytest.mark.benchmark(group=GROUP)
def test_art(benchmark) -> None:
    attacks = pytest.importorskip("art.attacks.evasion", reason="ART is not installed")
    pytest.importorskip("torchvision", reason="ART's patch attack needs torchvision")
    estimators = pytest.importorskip("art.estimators.classification", reason="ART is not installed")
    defense, task = attacked()
    classifier = estimators.PyTorchClassifier(
        model=defense.model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    patch = attacks.AdversarialPatchPyTorch(
        classifier,
        rotation_max=0.0,
        scale_min=5 / 28,
        scale_max=5 / 28 + 1e-6,
        learning_rate=0.2,
        max_iter=STARTS * STEPS,
        batch_size=1,
        patch_shape=(1, 28, 28),
        patch_type="square",
        optimizer="pgd",
        verbose=False,
        targeted=False,
    )

    def each() -> int:
        broken = 0
        for image, label in zip(task.images, task.label.tolist(), strict=True):
            values = image[None].numpy()
            patch.generate(values, np.eye(10, dtype=np.float32)[[label]])
            pasted = torch.from_numpy(patch.apply_patch(values, scale=5 / 28))
            broken += int(defense.predict(pasted.clamp(0, 1)) != label)
        return broken

    broken = benchmark.pedantic(each, rounds=1, iterations=1)
    ours = int(find("patch-pgd").run(Victim(defense), task).broken.sum())
    assert ours >= broken


@pytest.mark.parametrize("views", ["all", "touched"])
@pytest.mark.benchmark(group="a gradient for 16 pictures under a 5x5 patch, cifar10-columns")
def test_views_that_a_patch_touches(benchmark, views) -> None:
    defense = cp.load("cifar10-columns")
    images = torch.rand((16, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    victim, numbers = Victim(defense), list(range(len(images)))
    task = Task(images, defense.predict(images), cp.PatchThreat(5), numbers, 1, 1, 0.2, "random")
    clean, picture = CleanViews.of(victim, task), torch.arange(len(images))
    assert clean is not None
    mask = task.places().masks(torch.arange(0, 784, 49)[:, None])
    attacked = torch.where(mask, 0.5, images).requires_grad_()

    def gradient() -> torch.Tensor:
        leads = victim.leads(attacked, torch.Generator()) if views == "all" else clean.leads(attacked, picture, mask)
        return torch.autograd.grad(leads.amax(1).sum(), attacked)[0] * mask

    found = benchmark.pedantic(gradient, rounds=5, iterations=1, warmup_rounds=1)
    assert found.abs().sum() > 0
