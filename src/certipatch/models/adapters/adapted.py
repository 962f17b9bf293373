"""A classifier that carries its own preprocessing: it reads the images that the attacker paints."""

import hashlib
from typing import Annotated, Literal, final

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.errors import InputError

Side = Annotated[int, Field(ge=1, le=4096)]
Numbers = Annotated[tuple[float, ...], Field(min_length=1, max_length=4)]


@final
class Preprocessing(BaseModel):
    """The preprocessing of images in [0, 1] for a classifier. All of it comes after the attacker, and after the masks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[Side, Side] | None = None
    """(H, W) that the network reads; None if it reads any."""
    resize: Side | None = None
    """Images of another size: their shorter side becomes this, then the centre is cropped. None: straight to ``size``."""
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    antialias: bool = True
    scale: float = Field(default=1.0, gt=0)
    """The network's value of a white pixel before mean and std: 255 for those that read 0…255."""
    mean: Numbers = (0.0,)
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=4)] = (1.0,)
    order: Literal["RGB", "BGR"] = "RGB"
    channels: Literal[1, 3] = 3
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=100_000)] | None = None

    def __call__(self, pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, "N c h w"]:
        """Images in [0, 1] as the network reads them. InputError if their channels do not fit."""
        x = pictures
        if x.shape[1] != self.channels:
            if x.shape[1] != 1:
                raise InputError(f"pictures have {x.shape[1]} channels, but the model reads {self.channels}")
            x = x.expand(-1, self.channels, -1, -1)
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = self._fitted(x, self.size)
        if self.order == "BGR":
            x = x.flip(1)
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x * self.scale - mean) / std

    def _fitted(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        target, smooth = size, self.interpolation != "nearest"
        if self.resize is not None:
            shorter = min(x.shape[2:])
            target = tuple(
                max(n, round(side * self.resize / shorter)) for n, side in zip(size, x.shape[2:], strict=True)
            )
        x = F.interpolate(x, target, mode=self.interpolation, antialias=self.antialias and smooth).clamp(0, 1)
        top, left = ((have - want) // 2 for have, want in zip(target, size, strict=True))
        return x[:, :, top : top + size[0], left : left + size[1]]

    @property
    def fill(self) -> float:
        """The paint of masks: the grey that the network reads as nearly zero; 0.5 if the network names no mean."""
        if "mean" not in self.model_fields_set:
            return 0.5
        return min(1.0, max(0.0, sum(self.mean) / len(self.mean) / self.scale))


@final
class Adapted(nn.Module):
    """Somebody's classifier behind its preprocessing: images (N, C, H, W) in [0, 1] → logits (N, K).

    Args:
        network: what comes after the preprocessing; may give an object with ``logits``.
        preprocessing: see there.
        name: what it is called in results.
        identity: hex digest of what it is; None for one of its weights and preprocessing.
    """

    encoding = "picture"

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, name: str, identity: str | None = None):
        super().__init__()
        self.network, self.preprocessing, self.name = network, preprocessing, name
        self.training = network.training
        self.identity = identity or digest(network, preprocessing.model_dump_json())
        self.fill: float | tuple[float, ...] = getattr(network, "fill", preprocessing.fill)
        self.kept: Tensor | None = None
        """The classes that it answers with; None for all."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, where they are known."""
        known = self.preprocessing.classes
        return known if known is None or self.kept is None else tuple(known[i] for i in self.kept.tolist())

    @property
    def unmasked(self) -> "Adapted | None":
        """Its network for unmasked images, if it has one (see ``PatchCleanser``), behind the same preprocessing."""
        network = getattr(self.network, "unmasked", None)
        if not isinstance(network, nn.Module):
            return None
        adapted = Adapted(network, self.preprocessing, self.name, self.identity)
        adapted.kept = self.kept
        return adapted

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) that the network reads; None for any. Larger photographs are made so large before the attacker."""
        return self.preprocessing.size

    def only(self, names: tuple[str, ...]) -> bool:
        """Answer with these classes alone, in this order; False, and no change, where the model does not know all."""
        place = {name.casefold(): i for i, name in enumerate(self.preprocessing.classes or ())}
        if not all(name.casefold() in place for name in names):
            return False
        self.kept = torch.tensor([place[name.casefold()] for name in names])
        return True

    def forward(self, pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        answer = self.network(self.preprocessing(pictures))
        logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != pictures.shape[0]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(answer).__name__
            raise InputError(f"{self.name} gives {got} for {len(pictures)} pictures; logits (N, K) are needed")
        return logits if self.kept is None else logits[:, self.kept.to(logits.device)]

    @torch.inference_mode()
    def class_names(self, channels: int, image_size: tuple[int, int]) -> tuple[str, ...]:
        """The names of the classes; numbers where they are not known. InputError if names and answers differ."""
        logits = self(
            torch.full((1, channels, *image_size), 0.5, device=next(self.parameters(), torch.zeros(0)).device)
        )
        number = logits.shape[1]
        if self.classes is not None and len(self.classes) != number:
            raise InputError(f"{self.name} gives {number} classes, but names {len(self.classes)}")
        return self.classes or tuple(map(str, range(number)))


def digest(network: nn.Module, extra: str) -> str:
    """Hex SHA-256 of a network's parameters and buffers, with their names, and of ``extra``."""
    total = hashlib.sha256(f"{type(network).__qualname__}\0{extra}\0".encode())
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
