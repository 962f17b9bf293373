"""Which pictures, patches and models stand for a paper's data set here."""

from dataclasses import dataclass
from typing import Literal, final

from certipatch.data.known import KNOWN, canonical, known_classes, names
from certipatch.data.pictures import Pictures
from certipatch.errors import InputError
from certipatch.reproduce.bench import Wanted

Kind = Literal["columns", "rows", "blocks", "pixels"]


@final
@dataclass(frozen=True)
class Ablation:
    """A model of the smoothing paper by what its views show."""

    wanted: Wanted
    kind: Kind
    size: int
    """s: width of a band or block; of random pixels k, how many are shown."""
    count: int = 1
    """Bands or blocks per view."""
    stride: int = 1
    how: str = ""
    """The command that trains it, with N in place of its size."""
    trained: str = ""
    """How, where it is a second network for the same views."""

    @property
    def at(self) -> str:
        """Its hyperparameter, as the paper writes it."""
        return f"{'k' if self.kind == 'pixels' else 's'} = {self.size}" + (f", {self.trained}" if self.trained else "")

    @property
    def label(self) -> str:
        """What its views show."""
        several = "" if self.count == 1 else f", {self.count} per view"
        return f"{self.kind}, {self.at}{several}" + ("" if self.stride == 1 else f", stride {self.stride}")

    @property
    def command(self) -> str:
        """The command that trains it."""
        return self.how.replace("N", str(self.size))

    @property
    def views(self) -> dict[str, object]:
        """What a card says of its views."""
        if self.kind == "pixels":
            return {"name": "random-pixels", "keep": self.size}
        return {"name": self.kind, "width": self.size, "stride": self.stride, "wrap": True, "count": self.count}


@final
@dataclass(frozen=True)
class Study:
    """A data set of a paper's evaluation."""

    data: str
    patches: tuple[int | str, ...]
    models: tuple[Wanted, ...]
    title: str = ""
    image_size: tuple[int, int] | None = None
    ablations: tuple[Ablation, ...] = ()

    def model(self, role: str) -> Wanted:
        """The model in a role. KeyError where the study has none."""
        return {wanted.role: wanted for wanted in self.models}[role]

    def patch_words(self) -> list[str]:
        """The patches as the tables name them."""
        return [patch if isinstance(patch, str) else f"{patch}x{patch}" for patch in self.patches]

    def of(self, *kinds: Kind) -> tuple[Ablation, ...]:
        """The models for views of these kinds, one band or block each."""
        return tuple(a for a in self.ablations if a.kind in kinds and a.count == 1 and not a.trained)

    @property
    def second(self) -> tuple[Ablation, ...]:
        """Networks beside the usual ones for the same views."""
        return tuple(a for a in self.ablations if a.trained)

    @property
    def several(self) -> tuple[Ablation, ...]:
        """The models for several bands or blocks per view."""
        return tuple(a for a in self.ablations if a.count > 1)


def study_of(pictures: Pictures, studies: tuple[Study, ...]) -> Study:
    """The study that pictures belong to: by their name, else by classes and size. InputError where none does."""
    by_name = {study.data: study for study in studies}
    name = canonical(pictures.name)
    if name in by_name:
        return by_name[name]
    if name not in names() and name not in KNOWN:
        size = pictures.pixels([0]).shape[1:3]
        for study in studies:
            if pictures.class_names == known_classes(study.data) and size == study.image_size:
                return study
    raise InputError(
        f"this table is made for {' or '.join(by_name)}, not for {pictures.name}; give one of them by --data"
    )


CIFAR10 = Study(
    "cifar10",
    (2, 5, 8),
    (
        Wanted("bagnet", "cifar10-bagnet", 3),
        Wanted("bagnet-10", "cifar10-bagnet10", 3),
        Wanted("columns", "cifar10-columns", 2),
        Wanted("plain", "cifar10-plain", 0.25),
    ),
)
IMAGENETTE = Study(
    "imagenette",
    ("1%", "2%", "3%"),
    (
        Wanted("bagnet", "imagenette-bagnet17", 2),
        Wanted("bagnet-9", "imagenette-bagnet9", 2),
        Wanted("bagnet-33", "imagenette-bagnet33", 2),
        Wanted("columns", "imagenette-columns", 2),
        Wanted("plain", "imagenette-plain", 5),
    ),
)


def _ablation(
    data: str, kind: Kind, size: int, hours: float, recipe: str, name: str = "", count: int = 1, stride: int = 1
) -> Ablation:
    """A model by its usual name, or by ``name`` where a recipe makes it as it is; and the command that trains it."""
    letter = "k" if kind == "pixels" else "s"
    more = {key: value for key, value in (("count", count), ("stride", stride)) if value > 1}
    several = "".join(f"-{key}{value}" for key, value in more.items())
    role = f"{kind}-{letter}{size}{several}"
    fields: dict[str, object] = {"views.keep": "N"}
    if kind != "pixels":
        fields = {"views.name": kind, "views.width": "N", **{f"views.{key}": value for key, value in more.items()}}
    fields["name"] = f"{data}-{kind}-{letter}N{several}"
    changes = "" if name else "".join(f" --set {key}={value}" for key, value in fields.items())
    work = "training" if hours < 5 else "training and forward passes"
    wanted = Wanted(role, name or f"{data}-{role}", hours, work)
    return Ablation(wanted, kind, size, count, stride, f"certipatch train {recipe}{changes}")


def _smoothing(data: str, title: str, size: tuple[int, int], patch: int, ablations: tuple[Ablation, ...]) -> Study:
    return Study(data, (patch,), tuple(a.wanted for a in ablations), title, size, ablations)


# Hours on two cores: measured for columns of MNIST; else estimated, by multiply-adds and the rate measured there.
MNIST_VOTES, MNIST_NULL = (
    "mnist-columns-votes",
    "cifar10-columns-paper --set data=mnist --set augment.flip=false --set epochs=20",
)
SMOOTHING_MNIST = _smoothing(
    "mnist",
    "MNIST",
    (28, 28),
    5,
    (
        *(
            _ablation("mnist", "columns", s, 0.7, MNIST_VOTES, MNIST_VOTES if s == 2 else "")
            for s in (1, 2, 3, 4, 6, 8)
        ),
        *(_ablation("mnist", "rows", s, 0.7, MNIST_VOTES) for s in (1, 2, 3, 4)),
        *(_ablation("mnist", "blocks", s, 1.2, MNIST_VOTES) for s in (4, 6, 8, 10, 12)),
        *(_ablation("mnist", "pixels", k, 11, "mnist-random-pixels") for k in (5, 10, 15, 20)),
        _ablation("mnist", "pixels", 45, 11, "mnist-random-pixels", "mnist-random-pixels"),
        Ablation(
            Wanted("random-columns", "mnist-random-columns", 1.5),
            "columns",
            6,
            how="certipatch train mnist-random-columns",
            trained="by cross entropy",
        ),
        *(_ablation("mnist", "columns", s, 16, MNIST_NULL, count=2) for s in (1, 2)),
        _ablation("mnist", "blocks", 4, 36, MNIST_NULL, count=2, stride=4),
    ),
)
SMOOTHING_CIFAR10 = _smoothing(
    "cifar10",
    "CIFAR-10",
    (32, 32),
    5,
    (
        *(
            _ablation("cifar10", "columns", s, 2, "cifar10-columns", "cifar10-columns" if s == 4 else "")
            for s in (1, 2, 3, 4, 5, 6, 8)
        ),
        *(_ablation("cifar10", "blocks", s, 2, "cifar10-columns") for s in (8, 10, 12, 14)),
        *(_ablation("cifar10", "pixels", k, 500, "cifar10-random-pixels") for k in (5, 10, 15, 20, 25)),
        _ablation("cifar10", "pixels", 75, 500, "cifar10-random-pixels", "cifar10-random-pixels"),
        *(_ablation("cifar10", "columns", s, 22, "cifar10-columns-paper --set epochs=20", count=2) for s in (2, 4)),
        _ablation("cifar10", "blocks", 6, 68, "cifar10-columns-paper --set epochs=20", count=2, stride=4),
    ),
)
SMOOTHING_IMAGENETTE = _smoothing(
    "imagenette",
    "ImageNet",
    (224, 224),
    42,
    (_ablation("imagenette", "columns", 25, 3, "imagenette-columns", "imagenette-columns"),),
)
SMOOTHING = (SMOOTHING_MNIST, SMOOTHING_CIFAR10, SMOOTHING_IMAGENETTE)
