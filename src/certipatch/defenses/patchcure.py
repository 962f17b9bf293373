"""PatchCURE (Xiang et al., USENIX Security 2024): double masking behind a front that is computed once per image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.defenses.double_masking import PredictionTable, score_error
from certipatch.defenses.masked import checked_gap, checked_threats, covering_masks, per_axis
from certipatch.defenses.method import leads_of_network
from certipatch.defenses.settings import DoubleMaskingSettings, Side
from certipatch.defenses.settings import PerAxis as Number
from certipatch.defenses.soft_double_masking import sampled_pair_leads
from certipatch.errors import InputError
from certipatch.inference import canonical_logits
from certipatch.model_check import check_model
from certipatch.models import SharedFront
from certipatch.models.settings import NetworkSettings
from certipatch.rules import DoubleMask
from certipatch.threats import PatchThreat
from certipatch.views import MaskPairs, PixelSets, mask_set
from certipatch.views.incidence import sees
from certipatch.views.masks import pair_table
from certipatch.views.render import image_size

PerAxis = int | tuple[int, int] | None


class PatchCURESettings(DoubleMaskingSettings):
    """The masks are made for ``patch`` if no threat is given."""

    masks: Number | tuple[Number, Number] | None = None
    stride: Number | tuple[Number, Number] | None = None
    patch: Side = 5


DEFAULT = PatchCURESettings()


@final
class PatchCURE(ViewDefense):
    """Double masking on the features of a front of small receptive fields, computed once; a light back end reads them.

    Args:
        model: a ``models.SharedFront`` in eval mode.
        threat: the patch that masks are made for, or several; the answer depends on it.
        masks: masks per axis of the front's map, k or (rows, columns); by default 6, or as many as ``stride`` needs.
        stride: cells from mask to mask; None for the smallest that so many masks allow.
        all_margins: margins of all locations; False stops as soon as the verdict on the threat is known.
        batch_size: masked maps, or images, in a batch (default: as many as 2²⁰ pixels have images).
        min_mean_gap: the mean gap in confidence that lets a mask win against the majority (see ``rules.DoubleMask``); 0 asks
            nothing.

    A patch touches the features that see a pixel of it: a box of cells. Masks are boxes of cells that cover every such
    box; a pixel counts as hidden by a mask when no cell outside of it sees the pixel. That every location of the patch is
    hidden by some mask is checked with ``sees``, and the theorem is that of double masking.

    ``passes`` are whole passes of the network that the multiply-adds of an image amount to, rounded up.

    Departs from the paper: any choice of masks per axis, and certificates per location; its other front, attention within
    strips of a ViT, is here attention within squares.
    """

    name: ClassVar[str] = "patchcure"
    settings_class = PatchCURESettings
    in_words: ClassVar[str] = (
        "A first part of the network looks at small windows of the picture, once. A second part answers with each of "
        "many masks over what the first one found, and with every two of them; the answer is chosen from these as by double "
        "masking. Wherever the patch lies, some mask hides every window that sees it. Where such a mask says the same alone "
        "and together with every second mask, nothing painted under it can change the answer."
    )
    reads_whole_images: ClassVar[bool] = True
    trains_under_masks: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat | Sequence[PatchThreat],
        masks: PerAxis = None,
        stride: PerAxis = None,
        all_margins: bool = True,
        batch_size: int | None = None,
        min_mean_gap: float = DEFAULT.min_mean_gap,
    ):
        if not isinstance(model, SharedFront):
            raise InputError("patchcure needs a network with a shared front: shared-bagnet or shared-vit")
        super().__init__(model, None, batch_size)
        self.front: SharedFront = model
        self.front_end, self.back_end = FrontEnd(model), BackEnd(model)
        self.threats, self.all_margins = checked_threats(threat), all_margins
        self.min_mean_gap = checked_gap(min_mean_gap, "min_mean_gap")
        self.masks, self.stride = per_axis(masks, "masks"), per_axis(stride, "stride")
        self.theorem = DoubleMask(self.min_mean_gap).theorem
        self._covers: dict[tuple[int, int], Bool[Tensor, "L M"]] = {}
        self._cells: dict[tuple[int, int], MaskPairs] = {}
        self._costs: dict[tuple[int, ...], tuple[int, int]] = {}

    @classmethod
    def check_network(cls, network: NetworkSettings) -> None:
        if not network.shared_front:
            name = getattr(network, "name", "another")
            raise ValueError(f"patchcure needs a network with a shared front, shared-bagnet or shared-vit, not {name}")

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        """Through double masking on features; the front is passed once, forth and back."""
        back, pairs = self.behind_front(image_size(images))
        return sampled_pair_leads(back, pairs, self.front.features(images), generator)

    def compute_all_margins(self) -> None:
        self.all_margins = True

    def network_leads(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return leads_of_network(self.model, images)

    def settings(self) -> dict[str, Any]:
        threats = [threat.to_dict() for threat in self.threats]
        return {
            "masks": self.masks and list(self.masks),
            "stride": self.stride and list(self.stride),
            "min_mean_gap": self.min_mean_gap,
            "all_margins": self.all_margins,
            "threat": threats if len(threats) > 1 else threats[0],
        }

    def views_of(self, image_size: tuple[int, int]) -> MaskPairs:
        """Pairs of masks over pixels: what no cell outside of a mask of cells sees is hidden by it."""
        if image_size not in self._views:
            cells = cell_masks(self.front, self.threats, image_size, self.masks, self.stride)
            pixels = ~self.front.seen_pixels(~cells).cpu()
            _, covers = covering_masks(self.threats, image_size, pixels, None)
            self._cells[image_size] = MaskPairs(cells)
            self._views[image_size], self._covers[image_size] = MaskPairs(pixels), covers
        pairs = self._views[image_size]
        assert isinstance(pairs, MaskPairs)
        return pairs

    def rule(self, image_size: tuple[int, int]) -> DoubleMask:
        return DoubleMask(self.min_mean_gap)

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, None, Float64[Tensor, " B"]]:
        return ev.scores(logits), None, score_error(tolerance, logits)

    def tolerance(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        size = image_size(images)
        training = any(module.training for module in self.front.modules())
        autocast = torch.is_autocast_enabled(images.device.type)
        key = (*images.shape[1:], images.dtype, images.device, training, autocast)
        state = ev.weights_digest(self.front)
        if self._tolerance.get(key, (None,))[0] != state:
            pairs = self.views_of(size)  # a pair shows nothing that its masks alone do not
            index = pair_table(len(pairs.masks)).diagonal()
            some = MaskedFeatures(self.front, self._cells[size].visible(self.front.fields.grid, index))
            shown = PixelSets(pairs.visible(size, index))
            self._tolerance[key] = state, check_model(some, shown, images, self.batch_size)
            self._equivalents(images[:1], torch.tensor([1]))  # measured here, where nobody else counts multiply-adds
        return self._tolerance[key][1]

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        return self.label(self._evidence(images, certify=False))

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        return self._evidence(images, certify=True)

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        """Whole passes that looking at every pair amounts to."""
        first = next(self.front.parameters())
        probe = torch.zeros(1, self.front.in_channels, *image_size, dtype=first.dtype, device=first.device)
        pairs = torch.tensor([self.views_of(image_size).number(image_size)])
        return int(self._equivalents(probe, pairs)[0])

    def exported_network(self, image_size: tuple[int, int]) -> "MaskedFeatures":
        """Images → logits under all pairs of masks, for graphs and tests."""
        self.views_of(image_size)
        return MaskedFeatures(self.front, self._cells[image_size].visible(self.front.fields.grid))

    def behind_front(self, image_size: tuple[int, int]) -> tuple[nn.Module, MaskPairs]:
        """The back end as a network of maps with hidden cells, and all pairs of masks of cells: what attacks go through."""
        self.views_of(image_size)
        return self.back_end, self._cells[image_size]

    def _evidence(self, images: Float[Tensor, "B C H W"], certify: bool) -> Evidence:
        ev.check_images(images)
        tolerance, size = self.tolerance(images), image_size(images)
        features = canonical_logits(self.front_end, len(images), lambda rows: images[rows.to(images.device)])
        error = score_error(tolerance, images)
        table = PredictionTable(self.rule(size), self._cells[size], self.back_end, features, error, self.batch_size)
        table.first_round()
        table.second_round()
        if certify:
            table.certify_pairs(None if self.all_margins else self._covers[size].to(images.device))
        passes = self._equivalents(images[:1], table.passes)
        return replace(table.evidence(), image_size=size, passes=passes)

    def _equivalents(self, image: Float[Tensor, "1 C H W"], pairs: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
        """Whole passes that one front and so many back ends amount to, by multiply-adds, rounded up.

        A back end counts as if nothing were hidden from it; those that skip what is hidden take less.
        """
        key = tuple(image.shape[1:])
        if key not in self._costs:
            with torch.inference_mode():
                with FlopCounterMode(display=False) as ahead:
                    features = self.front.features(image)
                with FlopCounterMode(display=False) as behind:
                    self.front.back(features)
            self._costs[key] = ahead.get_total_flops() // 2, behind.get_total_flops() // 2
        front, back = self._costs[key]
        return -(-(front + pairs * back) // max(1, front + back))


@final
class MaskedFeatures(nn.Module):
    """A shared front under some masks of cells at once: images (B, C, H, W) → logits (B, v, K)."""

    encoding = "all-views"

    def __init__(self, model: SharedFront, shown: Bool[Tensor, "v h w"]):
        super().__init__()
        self.model = model
        self.register_buffer("shown", shown.to(next(model.parameters()).device), persistent=False)
        self.training = False  # it is the model's own that matters

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B v K"]:
        features, shown = self.model.features(images), self.get_buffer("shown")
        masked = torch.where(shown[None, :, None], features[:, None], 0.0)
        return self.model.back(masked.flatten(0, 1)).unflatten(0, (-1, shown.shape[0]))


class FrontEnd(nn.Module):
    """The front as a network of its own."""

    encoding = "all-views"

    def __init__(self, model: SharedFront):
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D1 h w"]:
        return self.model.features(images)


class BackEnd(nn.Module):
    """The back end, as a network of maps whose hidden cells are painted with zeros."""

    encoding, fill = "fill", 0.0

    def __init__(self, model: SharedFront):
        super().__init__()
        self.model = model

    def forward(self, features: Float[Tensor, "n D1 h w"]) -> Float[Tensor, "n K"]:
        return self.model.back(features)


def cell_masks(
    model: SharedFront,
    threats: tuple[PatchThreat, ...],
    image_size: tuple[int, int],
    masks: tuple[int, int] | None,
    stride: tuple[int, int] | None,
) -> Bool[Tensor, "M h w"]:
    """Boxes of cells, of which one holds every cell that sees a pixel of the patch, wherever it lies."""
    boxes = []
    for threat in threats:
        for mask in threat.masks(image_size):
            relation = sees(model.fields, PatchThreat((len(mask), len(mask[0]))), image_size)
            touched = relation.rows.unflatten(1, model.fields.grid)
            height, width = (int(_extent(touched.any(axis)).max()) for axis in (2, 1))
            boxes.append(PatchThreat((max(height, 1), max(width, 1)), count=threat.count))
    return mask_set(boxes, model.fields.grid, masks, stride)


def _extent(touched: Bool[Tensor, "R n"]) -> Int64[Tensor, " R"]:
    """Cells from the first to the last that is touched."""
    place = torch.arange(touched.shape[1])
    last = torch.where(touched, place, -1).amax(1)
    first = torch.where(touched, place, touched.shape[1]).amin(1)
    return (last - first + 1).clamp(min=0)
