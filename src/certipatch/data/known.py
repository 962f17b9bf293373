"""The datasets known by name, with their Hub ids and the names of their classes."""

from dataclasses import dataclass

SAMPLE = "fashion-sample"
"""The name of the sample that ships in the package."""


@dataclass(frozen=True)
class KnownDataset:
    """A known dataset: its Hub id and configuration, one line about it, its class names, and True if it is lossless."""

    hub: str
    about: str
    classes: tuple[str, ...]
    lossless: bool = True
    config: str | None = None


_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGENETTE = (
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
)

KNOWN = {
    "mnist": KnownDataset("ylecun/mnist", "handwritten digits, 28x28 grey, 10 classes", tuple("0123456789")),
    "fashion-mnist": KnownDataset(
        "zalando-datasets/fashion_mnist", "pictures of clothes, 28x28 grey, 10 classes", _FASHION
    ),
    "cifar10": KnownDataset("uoft-cs/cifar10", "small photographs, 32x32 colour, 10 classes", _CIFAR10),
    "imagenette": KnownDataset(
        "frgfm/imagenette",
        "ten ImageNet classes, photographs of many sizes (give a size)",
        _IMAGENETTE,
        lossless=False,
        config="320px",
    ),
}
"""Known datasets by name."""


def dataset_names() -> dict[str, str]:
    """Every dataset name that `load` takes, with one line about it. The sample comes first: it needs no network."""
    sample = "1,000 Fashion-MNIST test pictures that ship with certipatch, 28x28 grey, 10 classes"
    return {SAMPLE: sample} | {name: f"{known.about} (Hub: {known.hub})" for name, known in KNOWN.items()}


def canonical(name: str) -> str:
    """The known name of a Hub id (`ylecun/mnist` -> `mnist`); any other name unchanged."""
    return next((key for key, known in KNOWN.items() if known.hub == name), name)


def known_classes(name: str) -> tuple[str, ...] | None:
    """The class names of a known dataset or of the sample; None for any other name."""
    known = KNOWN.get("fashion-mnist" if name == SAMPLE else name)
    return known.classes if known else None
