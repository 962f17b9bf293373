"""Which pictures, patches and models stand for a paper's data set here."""

from dataclasses import dataclass
from typing import final

from certipatch.reproduce.bench import Wanted


@final
@dataclass(frozen=True)
class Study:
    """A data set of PatchGuard's evaluation."""

    data: str
    patches: tuple[int | str, ...]
    models: tuple[Wanted, ...]

    def model(self, role: str) -> Wanted:
        """The model in a role. KeyError where the study has none."""
        return {wanted.role: wanted for wanted in self.models}[role]

    def patch_words(self) -> list[str]:
        """The patches as the tables name them."""
        return [patch if isinstance(patch, str) else f"{patch}x{patch}" for patch in self.patches]


CIFAR10 = Study(
    "cifar10",
    (2, 5, 8),
    (
        Wanted("bagnet", "cifar10-bagnet", 3),
        Wanted("bagnet-10", "cifar10-bagnet10", 3),
        Wanted("columns", "cifar10-columns", 2),
        Wanted("plain", "cifar10-plain", 1),
    ),
)
IMAGENETTE = Study(
    "imagenette",
    ("1%", "2%", "3%"),
    (
        Wanted("bagnet", "imagenette-bagnet17", 33),
        Wanted("bagnet-9", "imagenette-bagnet9", 33),
        Wanted("bagnet-33", "imagenette-bagnet33", 33),
        Wanted("columns", "imagenette-columns", 3),
        Wanted("plain", "imagenette-plain", 5),
    ),
)
