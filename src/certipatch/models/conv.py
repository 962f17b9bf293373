"""A plain convolutional network that learns fast on small pictures: pairs of convolutions with pooling in between.

The layout follows what works at small budgets on CIFAR-10 (wide late stages, max pooling, GELU).
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.layers import Shortcut
from certipatch.models.settings import Depth, NetworkSettings, Widths
from certipatch.views import Bands, Blocks, Columns, Cross, RandomViews, Rows, Views

WholeEncoding = Literal["fill", "null"]
"""Hidden pixels of whole pictures: painted, or zeros in ``[x, 1 − x]``."""


class ConvSettings(NetworkSettings):
    """Logits of small images, whole, cropped to a band or block, or NULL-encoded, by plain convolutions."""

    name: Literal["conv"] = "conv"
    widths: Widths = (64, 128, 256)
    stride: Annotated[int, Field(ge=1, le=4)] = 1
    """Step of the first convolution."""
    depth: Depth = 2
    """Convolutions of each stage, at least 2."""
    flip_tta: bool = False
    """Mirror images, too, give logits once the network is trained; the mean counts."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divisor of the logits once the network is trained."""
    encoding: Annotated[WholeEncoding, BeforeValidator(lambda value: "null" if value is None else value)] = "fill"
    """Hidden pixels of whole images (YAML's own null is read as ``null``); views are encoded as they need."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        if isinstance(views, Cross):
            return CrossConvNet(views, channels, classes, image_size, **self.sizes())
        return ConvNet(views, channels, classes, image_size, **self.sizes())


class ConvNet(nn.Module):
    """Logits of small pictures: whole, cropped to a band or block, or NULL-encoded.

    Args:
        views: the bands or blocks that it reads one at a time, cropped, with their position as channels; random views,
            as ``[x, 1 − x]`` with zeros for hidden pixels; None for whole images.
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) of the images.
        widths: channels of each stage. A stage halves an axis while it has more than 4 pixels, or 2 once both are so
            short.
        stride: of the first convolution; 2 makes large images four times as cheap.
        depth: convolutions of a stage; from the third on, each adds to what comes in.
        flip_tta: once trained, the answer is the mean of those to what is read and to its mirror image, left to right,
            which shows the same pixels; for networks that learned from images of both kinds.
        temperature: once trained, logits are divided by it; below 1 confidences are sharper, which robust masking and
            thresholds count on. To be chosen on held-out images.
        encoding: ``null`` if whole images are read as ``[x, 1 − x]``, with zeros for hidden pixels, a value that no pixel
            has; ``fill`` if hidden pixels are painted.

    ``forward`` maps what is read (N, C + positions, h, w) to logits (N, K).
    """

    def __init__(
        self,
        views: Views | RandomViews | None,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        widths: tuple[int, ...] = (64, 128, 256),
        stride: int = 1,
        depth: int = 2,
        flip_tta: bool = False,
        temperature: float = 1.0,
        encoding: WholeEncoding = "fill",
    ):
        super().__init__()
        if depth < 2:
            raise InputError(f"a stage of the conv network has at least 2 convolutions, not {depth}")
        self.views, self.width, self.flip_tta, self.temperature = views, image_size[1], flip_tta, temperature
        self.encoding = "picture" if views is None else "crop"
        size, channels = image_size, in_channels
        if encoding == "null" and views is not None:
            raise InputError("encoding: null is for whole pictures; leave it out, or views")
        if isinstance(views, Bands):
            length = image_size[0] if views.name == "columns" else image_size[1]
            size, channels = (length, views.width), in_channels + 1
        elif isinstance(views, Blocks):
            size, channels = (views.width, views.width), in_channels + 2
        elif isinstance(views, RandomViews) or encoding == "null":
            self.encoding, channels = "null", 2 * in_channels
        elif views is not None:
            raise InputError(f"the conv network reads bands, blocks or whole pictures, not {views.settings()['name']}")
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0] // 2, 3, stride, 1), nn.GELU()]
        inputs, size = widths[0] // 2, tuple(-(-side // stride) for side in size)
        for outputs in widths:
            pool = tuple(2 if side > 4 or (max(size) <= 8 and side > 1) else 1 for side in size)
            layers += [
                nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
                nn.MaxPool2d(pool, ceil_mode=True),
                nn.BatchNorm2d(outputs),
                nn.GELU(),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.GELU(),
            ]
            for _ in range(depth - 2):
                more = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
                layers += [Shortcut(nn.Sequential(*more)), nn.GELU()]
            size = tuple(-(-side // step) for side, step in zip(size, pool, strict=True))
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, views: Float[Tensor, "N C1 h w"]) -> Float[Tensor, "N K"]:
        answer = self._answer(views)
        if self.training:
            return answer
        if self.flip_tta:
            answer = (answer + self._answer(self.mirrored(views))) / 2
        return answer / self.temperature

    def _answer(self, views: Float[Tensor, "N C1 h w"]) -> Float[Tensor, "N K"]:
        return self.head(torch.amax(self.body(views), dim=(2, 3)))

    def mirrored(self, views: Float[Tensor, "N C1 h w"]) -> Float[Tensor, "N C1 h w"]:
        """Map rendered views to those of the mirror images, left to right: the same pixels, at their mirrored position."""
        if isinstance(self.views, Rows):  # a row's crop is turned, and stays where it is
            return views.flip(2)
        turned = views.flip(3)
        if isinstance(self.views, Columns | Blocks):  # the last channel is the first column, as a share of the width
            first = 1 - self.views.width / self.width - turned[:, -1:]
            turned = torch.cat([turned[:, :-1], torch.remainder(first + 1e-4, 1) - 1e-4], 1)  # no −0.0000001 wraps
        return turned


class CrossConvNet(nn.Module):
    """Two conv networks, one for the column crops of a cross and one for its row crops; arguments as for ``ConvNet``.

    The last channel of a crop says which of the two it is, so that ``forward`` takes any mixture of them.
    """

    encoding = "crop"

    def __init__(self, views: Cross, in_channels: int, num_classes: int, image_size: tuple[int, int], **sizes: Any):
        super().__init__()
        self.parts = nn.ModuleList(ConvNet(part, in_channels, num_classes, image_size, **sizes) for part in views.parts)
        self.num_classes = num_classes

    def forward(self, views: Float[Tensor, "N C2 h w"]) -> Float[Tensor, "N K"]:
        turned = views[:, -1, 0, 0] > 0.5
        parts = [
            (chosen, part(views[chosen, :-1]))
            for part, chosen in zip(self.parts, (~turned, turned), strict=True)
            if bool(chosen.any())
        ]
        answers = torch.empty((len(views), self.num_classes), dtype=parts[0][1].dtype, device=views.device)
        for chosen, answer in parts:
            answers[chosen] = answer
        return answers
