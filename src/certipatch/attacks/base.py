"""The contract of an attack: a victim, a task of images and locations, and an outcome by the victim's own answers."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Generator, Tensor

from certipatch.attacks import losses
from certipatch.attacks.places import Places
from certipatch.defenses.base import Defense, ViewDefense
from certipatch.errors import InputError
from certipatch.threats import PatchThreat, SparseThreat, Threat
from certipatch.views.render import image_size

Notify = Callable[[int], None]
"""Told the number of images that are done with."""


@final
@dataclass(frozen=True)
class Answer:
    """Hard answers: labels, and which images raise an alarm (detection only)."""

    label: Int64[Tensor, " N"]
    alarm: Bool[Tensor, " N"]


@final
class Victim:
    """A defense under attack: its answers, and the leads that attacks raise.

    Args:
        defense: anything with ``predict``; a detector says with ``alarm`` or its rule which images raise one.
        adaptive: attack through the defense; False: its network alone, as an attacker who knows nothing of it would: the
            defense is asked at the end, once per image.
        bf16: networks are passed in bfloat16 for leads and their gradients, never for answers.
    """

    def __init__(self, defense: Any, adaptive: bool = True, bf16: bool = False):
        self.defense, self.adaptive, self.bf16 = defense, adaptive, bf16

    def answer(self, images: Float[Tensor, "N C H W"]) -> Answer:
        """Answer as the defense itself does."""
        with torch.no_grad():
            if getattr(self.defense, "notion", "recovery") != "detection":
                label = self.defense.predict(images)
                return Answer(label, torch.zeros_like(label, dtype=torch.bool))
            evidence = self.defense.evidence(images)
            label = self.defense.label(evidence)
            if isinstance(self.defense, ViewDefense) and hasattr(self.defense.rule(evidence.image_size), "alarm"):
                alarm = self.defense.rule(evidence.image_size).alarm(evidence.values)  # type: ignore[attr-defined]
            else:
                alarm = self.defense.certificate(evidence, PatchThreat(1)).alarm
            assert isinstance(alarm, Tensor)
            return Answer(label, alarm)

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        """Compute a lead of each class over the answer; differentiable."""
        with self.passes(images):
            if self.adaptive:
                return losses.leads(self.defense, images, generator)
            return losses.network_leads(self.defense, images)

    def passes(self, images: Tensor) -> torch.autocast:
        """In which precision networks are passed for leads of such images."""
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16)

    def check_gradients(self, images: Float[Tensor, "N C H W"]) -> None:
        """InputError if the defense gives no gradient with respect to the image."""
        probe = images[:1].detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                leads = self.leads(probe, torch.Generator().manual_seed(0))
                grad = torch.autograd.grad(leads.sum(), probe, allow_unused=True)[0] if leads.requires_grad else None
        except (RuntimeError, NotImplementedError):
            grad = None
        if grad is None or not bool(torch.isfinite(grad).all()):
            name = getattr(self.defense, "name", type(self.defense).__name__)
            raise InputError(
                f"{name} gives no gradient with respect to the picture; attacks that need none: square, universal with "
                "--steps 0"
            )


@final
@dataclass(frozen=True)
class Task:
    """The images, the threat and the effort of an attack.

    images: (B, C, H, W). label: the answers to change. threat: None for the L∞ attack. numbers: what the images are
    called, so that the random numbers of a start do not depend on the batch it comes in. starts, steps, step: restarts,
    iterations of each, size of a step. search: how locations are chosen, see ``locate``. margins: of the locations, (B, L), from
    the certificate, or None. target: the class that shall be answered, or None for any other. epsilon: of L∞.
    batch: rows of one gradient. prepared: what ``Attack.prepare`` gave.
    """

    images: Float[Tensor, "B C H W"]
    label: Int64[Tensor, " B"]
    threat: Threat | None
    numbers: list[int]
    starts: int
    steps: int
    step: float = 0.05
    search: str = "auto"
    margins: Float64[Tensor, "B L"] | None = None
    target: int | None = None
    epsilon: float = 0.0
    seed: int = 0
    batch: int = 256
    prepared: Tensor | None = None

    def generator(self, picture: int, start: int) -> Generator:
        """Random numbers of one start on one image."""
        text = f"{self.seed}/{self.numbers[picture]}/{start}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))

    def loss(self, leads: Float[Tensor, "N K"], picture: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The lead of the target, or of the foremost class that is not to be the answer, for rows of these images."""
        if self.target is not None:
            return leads[:, self.target]
        own = self.label[picture].to(leads.device)
        return leads.scatter(1, own[:, None], -torch.inf).amax(1)

    def places(self) -> Places:
        """The locations of the threat's patches. InputError without a patch threat."""
        if not isinstance(self.threat, PatchThreat):
            raise InputError(f"there are no places of {self.threat}; give --patch")
        return Places(self.threat, image_size(self.images))


@final
@dataclass(eq=False)
class Outcome:
    """The result of an attack on B images.

    broken: the answer is another one (of a detector: and there is no alarm), or with a target that one; decided by the
    victim. attacked: the image that did it, or of unbroken ones the one of largest loss. label, alarm: the answer to
    ``attacked``. loss: largest lead of a wrong class. choice: the locations painted (B, count), −1 where the attack has
    none. tried: for every image the numbers of the locations tried. violated: locations of positive margin at which an
    attack changed the answer, which no theorem allows.
    """

    broken: Bool[Tensor, " B"]
    attacked: Float[Tensor, "B C H W"]
    label: Int64[Tensor, " B"]
    alarm: Bool[Tensor, " B"]
    loss: Float[Tensor, " B"]
    choice: Int64[Tensor, "B count"]
    queries: int = 0
    tried: list[set[int]] = field(default_factory=list)
    violated: list[set[int]] = field(default_factory=list)


class Attack(ABC):
    """One attack, without state: settings are in the task."""

    name: ClassVar[str]
    gradients: ClassVar[bool] = True
    """True if the attack needs gradients of the victim."""
    starts: ClassVar[int]
    """Default number of restarts."""
    steps: ClassVar[int]
    """Default number of iterations of each."""

    def check(self, threat: Threat | None) -> None:
        """InputError if the attack does not fit the threat."""
        if not isinstance(threat, PatchThreat):
            hint = "sparse" if isinstance(threat, SparseThreat) else "linf"
            raise InputError(f"{self.name} paints a patch: give --patch, or use --attack {hint}")

    def prepare(self, victim: Victim, task: Task) -> Tensor | None:
        """Learn once from some of the images, for all of them; None if the attack learns nothing."""
        return None

    @abstractmethod
    def run(self, victim: Victim, task: Task, notify: Notify = lambda done: None) -> Outcome:
        """Attack every image of a task."""


def certifies(defense: object) -> bool:
    """Test if a defense gives certificates at all; empirical ones do not."""
    return isinstance(defense, Defense)
