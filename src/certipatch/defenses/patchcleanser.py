"""PatchCleanser (Xiang et al., USENIX Security 2022): double masking around any classifier."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence
from certipatch.defenses.double_masking import LargerMasks, MultiScaleTable, PredictionTable, score_error
from certipatch.defenses.masked import (
    MaskDefense,
    MaskedClassifier,
    PerAxis,
    checked_fallback,
    checked_gap,
    covering_masks,
    per_axis,
)
from certipatch.defenses.method import leads_of_network
from certipatch.defenses.settings import DoubleMaskingSettings, Gap, MaskSettings
from certipatch.defenses.settings import PerAxis as Number
from certipatch.defenses.soft_double_masking import sampled_pair_leads
from certipatch.errors import InputError
from certipatch.model_check import check_model
from certipatch.rules import DoubleMask
from certipatch.rules.double_mask import Fallback
from certipatch.rules.soft import lead_of
from certipatch.threats import PatchThreat
from certipatch.views import MaskPairs, PixelSets
from certipatch.views.masks import enclosing_pairs, prime_divisions
from certipatch.views.render import Fill, image_size


class PatchCleanserSettings(MaskSettings, DoubleMaskingSettings):
    """Smaller masks, by ``subdivisions`` of the others, are evaluated only where the gap under the larger ones is below
    ``exit_gap``. ``fallback`` gives the label if no mask wins."""

    subdivisions: Number | tuple[Number, Number] | None = None
    exit_gap: Gap | tuple[Gap, ...] = 0.5
    fallback: Fallback = "majority"


DEFAULT = PatchCleanserSettings()


@final
class PatchCleanser(MaskDefense):
    """Double masking: the prediction that stays when any second mask is laid over the image. Around any classifier.

    Args:
        model: an ``nn.Module`` in eval mode that maps images (N, C, H, W) in [0, 1] to logits (N, K), whatever it does
            with them inside; or one of our networks that read NULL-encoded images.
        threat: the patch that masks are made for, or several, such as different sizes; the label depends on it.
        masks: masks per axis, k or (rows, columns); by default 6, or as many as ``stride`` needs. Or bool (M, H, W), your
            own.
        stride: pixels from mask to mask; None for the smallest that so many masks allow.
        fill: what masks are painted with; None for the model's own ``fill``, else 0.5.
        all_margins: margins of all locations; False stops as soon as the verdict on the threat is known, and leaves −inf
            where nothing was proven until then.
        batch_size: masked images per forward pass (default: 2²⁰ pixels).
        min_mean_gap: the mean gap in confidence that lets a mask win against the fallback (see ``rules.DoubleMask``); 0 asks
            nothing.
        subdivisions: parts per axis that each of the masks is divided into, d or (rows, columns), by one prime factor after
            another, such as 4 by halves twice. Double masking is then that of the smallest masks. A prediction under larger
            masks stands for all pairs within, if its gap reaches ``exit_gap``.
        exit_gap: that gap in confidence; one number, or one for each size of masks but the smallest.
        fallback: the label if no mask wins: of the ``majority`` of masks, or the prediction on the ``unmasked`` image. Uses
            the network ``model.unmasked`` for that if there is one, which may have learned for accuracy alone.

    First come the unmasked image, if the fallback needs it, and the first round: all images under one mask. The second round
    refutes the disagreers with the fallback. Then the certificate needs pairs, in the order of their one-mask gaps, the weakest
    first. A pair is predicted once, and not at all if both its masks have failed. Labels and certified locations are those of
    the full table of M(M+1)/2 predictions.

    The masks are cut out of the image that the attacker paints, before anything that the model does to it. That they cover the
    threat is checked with ``sees``. Certificates for other threats keep the label, and have margin −inf where no mask covers.

    Every entry of the table comes from an image in which both small masks are fully hidden, so the theorem holds for it as it
    is. If a gap is within rounding of ``exit_gap``, an entry certifies only if both ways agree (see ``MultiScaleTable``).
    """

    name: ClassVar[str] = "patchcleanser"
    settings_class = PatchCleanserSettings
    in_words: ClassVar[str] = (
        "The network looks at the picture with each of many masks over it, and with every two of them. The "
        "answer is that of most masks, or, where that is asked for, the one to the whole picture; a mask that dissents is "
        "believed instead if it stays with its answer under every second mask. Wherever the patch lies, some mask hides it. "
        "Where such a mask says the same alone and together with every second mask, nothing painted under it can change the "
        "answer."
    )

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat | Sequence[PatchThreat],
        masks: PerAxis | Bool[Tensor, "M H W"] = None,
        stride: PerAxis = None,
        fill: Fill | None = None,
        all_margins: bool = True,
        batch_size: int | None = None,
        min_mean_gap: float = DEFAULT.min_mean_gap,
        subdivisions: PerAxis = DEFAULT.subdivisions,
        exit_gap: float | Sequence[float] = DEFAULT.exit_gap,
        fallback: Fallback = DEFAULT.fallback,
    ):
        super().__init__(model, threat, masks, stride, fill, batch_size)
        self.all_margins, self.min_mean_gap = all_margins, checked_gap(min_mean_gap, "min_mean_gap")
        self.fallback: Fallback = checked_fallback(fallback)
        own = getattr(model, "unmasked", None)
        self.unmasked = MaskedClassifier(own if fallback == "unmasked" and isinstance(own, nn.Module) else model, fill)
        self.subdivisions = per_axis(subdivisions, "subdivisions")
        self.divisions = prime_divisions(self.subdivisions or (1, 1))
        gaps = list(exit_gap) if isinstance(exit_gap, Sequence) else [exit_gap] * len(self.divisions)
        self.exit_gaps = tuple(checked_gap(gap, "exit_gap") for gap in gaps)
        if len(gaps) != len(self.divisions):
            raise InputError(
                f"exit_gap is a gap, or one for each of {len(self.divisions)} larger sizes of masks, not {exit_gap}"
            )
        if self.subdivisions and isinstance(masks, Tensor):
            raise InputError("subdivisions are of masks per axis; give their number as masks, not masks of your own")
        self.theorem = DoubleMask(self.min_mean_gap).theorem
        self._covers: dict[tuple[int, int], Bool[Tensor, "L M"]] = {}
        self._sizes: dict[tuple[int, int], list[MaskPairs]] = {}
        self._enclosing: dict[tuple[int, int], list[Int64[Tensor, " V"]]] = {}

    def settings(self) -> dict[str, Any]:
        settings = super().settings() | {"min_mean_gap": self.min_mean_gap, "all_margins": self.all_margins}
        if self.divisions:
            settings |= {"subdivisions": list(self.subdivisions or ()), "exit_gap": list(self.exit_gaps)}
        return settings | ({"fallback": self.fallback} if self.fallback != "majority" else {})

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"]:
        """Through double masking with the largest masks, and through the unmasked image if it is the fallback."""
        pairs = self.sizes(image_size(images))[0]
        unmasked = None
        if self.fallback == "unmasked":
            every = PixelSets(torch.ones_like(pairs.masks[:1]))
            unmasked = lead_of(ev.differentiable_logits(self.unmasked, every, images)[:, 0].float())
        return sampled_pair_leads(self.model, pairs, images, generator, unmasked)

    def compute_all_margins(self) -> None:
        self.all_margins = True

    def network_leads(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return leads_of_network(self.unmasked, images)

    def views_of(self, image_size: tuple[int, int]) -> MaskPairs:
        if image_size not in self._views:
            parts = [self.divisions[:number] for number in range(len(self.divisions) + 1)]
            sizes = [covering_masks(self.threats, image_size, self.masks, self.stride, divided) for divided in parts]
            smallest, self._covers[image_size] = sizes[-1]
            self._sizes[image_size] = [MaskPairs(masks) for masks, _ in sizes]
            self._enclosing[image_size] = enclosing_pairs([masks for masks, _ in sizes])
            self._views[image_size] = MaskPairs(smallest, self.fallback == "unmasked")
        views = self._views[image_size]
        assert isinstance(views, MaskPairs)
        return views

    def larger(self, image_size: tuple[int, int]) -> list[LargerMasks]:
        """The masks of every size but the smallest, the largest first."""
        sizes = self.sizes(image_size)[:-1]
        return list(map(LargerMasks, sizes, self._enclosing[image_size], self.exit_gaps))

    def sizes(self, image_size: tuple[int, int]) -> list[MaskPairs]:
        """Pairs of masks of every size, the largest first."""
        self.views_of(image_size)
        return self._sizes[image_size]

    def rule(self, image_size: tuple[int, int]) -> DoubleMask:
        return DoubleMask(self.min_mean_gap, self.fallback)

    def checked(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        """The network under masks, whose rounding counts; of one of whole images only that its answers are its own."""
        pairs = self.sizes(image_size(images))[-1]
        if self.fallback == "unmasked":
            check_model(self.unmasked, PixelSets(torch.ones_like(pairs.masks[:1])), images, self.batch_size)
        return check_model(self.model, pairs, images, self.batch_size)

    def values(self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance) -> tuple[Tensor, None, Tensor]:
        return ev.scores(logits), None, score_error(tolerance, logits)

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        return self.label(self._table(images, certify=False).evidence())

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        return self._table(images, certify=True).evidence()

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        return (self.fallback == "unmasked") + sum(pairs.number(image_size) for pairs in self.sizes(image_size))

    def to(self, device: str | torch.device) -> "PatchCleanser":
        self.unmasked.to(device)
        super().to(device)
        return self

    def _table(self, images: Float[Tensor, "B C H W"], certify: bool) -> PredictionTable:
        """The predictions that labels need, or certificates."""
        ev.check_images(images)
        error, size = score_error(self.tolerance(images), images), image_size(images)
        arguments = self.rule(size), self.views_of(size), self.model, images, error, self.batch_size
        table = MultiScaleTable(*arguments, self.larger(size)) if self.divisions else PredictionTable(*arguments)
        table.predict_unmasked(self.unmasked)
        table.first_round()
        table.second_round()
        if certify:
            table.certify_pairs(None if self.all_margins else self._covers[size].to(images.device))
        return table
