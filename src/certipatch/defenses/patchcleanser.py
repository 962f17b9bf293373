"""PatchCleanser (Xiang et al., USENIX Security 2022): double masking around any classifier."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.errors import InputError
from certipatch.relation import sees
from certipatch.rules import DoubleMask
from certipatch.rules.double_mask import predictions
from certipatch.threats import PatchThreat
from certipatch.views import MaskPairs, PixelSets, mask_set
from certipatch.views.masks import pair_table
from certipatch.views.render import Fill

PerAxis = int | tuple[int, int] | None


@final
class BehindMasks(nn.Module):
    """A classifier of whole pictures that is shown masked ones; a network of NULL-encoded ones is shown those.

    Args:
        model: maps pictures (N, C, H, W) in [0, 1] to logits (N, K).
        fill: what masks are painted with, one value or one per channel; None for the model's own ``fill``, else 0.5.
    """

    def __init__(self, model: nn.Module, fill: Fill | None = None):
        super().__init__()
        encoding = getattr(model, "encoding", "picture")
        if encoding not in ("picture", "fill", "null"):
            raise InputError(
                f"masks lie over whole pictures, but this network reads {encoding}; give a plain classifier"
            )
        self.model, self.encoding = model, "null" if encoding == "null" else "fill"
        self.fill: Fill = checked_fill(getattr(model, "fill", 0.5) if fill is None else fill)
        self.training = False  # it is the model's own that matters

    def forward(self, pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.model(pictures)


@final
class PatchCleanser(ViewDefense):
    """Double masking: the answer that stays when any second mask is laid over the picture. Around any classifier.

    Args:
        model: an ``nn.Module`` in eval mode that maps pictures (N, C, H, W) in [0, 1] to logits (N, K), whatever it does
            with them inside; or one of our networks that read NULL-encoded pictures.
        threat: the patch that masks are made for, or several, such as different sizes; the answer depends on it.
        masks: masks per axis, k or (rows, columns); by default 6, or as many as ``stride`` needs. Or bool (M, H, W), your
            own.
        stride: pixels from mask to mask; None for the smallest that so many masks allow.
        fill: what masks are painted with; None for the model's own ``fill``, else 0.5.
        maps: margins of all places; False stops as soon as the verdict on the threat is known, and leaves −inf where
            nothing was proven until then.
        batch_size: masked pictures per forward pass (default: 2²⁰ pixels).

    First all one-mask pictures are looked at, then rows of disagreers until they fail, then pairs in the order of their
    one-mask confidence, the weakest first; a pair is looked at once, and not at all where both its masks have failed.
    Labels, and which places are certified, are those of the full table of M(M+1)/2.

    The masks are cut out of the picture that the attacker paints, before anything that the model does to it. That they
    cover the threat is checked with ``sees``; certificates for other threats keep the label, and have margin −inf where
    no mask covers.
    """

    name: ClassVar[str] = "patchcleanser"

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat | Sequence[PatchThreat],
        masks: PerAxis | Bool[Tensor, "M H W"] = None,
        stride: PerAxis = None,
        fill: Fill | None = None,
        maps: bool = True,
        batch_size: int | None = None,
    ):
        super().__init__(BehindMasks(model, fill), None, batch_size)
        self.threats = checked_threats(threat)
        self.masks: Any = masks if isinstance(masks, Tensor) else per_axis(masks, "masks")
        self.stride, self.maps = per_axis(stride, "stride"), maps
        self.theorem = DoubleMask().theorem
        self._covers: dict[tuple[int, int], Bool[Tensor, "L M"]] = {}

    def settings(self) -> dict[str, Any]:
        return mask_settings(self) | {"maps": self.maps}

    def views_of(self, image_size: tuple[int, int]) -> MaskPairs:
        if image_size not in self._views:
            masks, covers = covering_masks(self.threats, image_size, self.masks, self.stride)
            self._views[image_size], self._covers[image_size] = MaskPairs(masks), covers
        found = self._views[image_size]
        assert isinstance(found, MaskPairs)
        return found

    def rule(self, image_size: tuple[int, int]) -> DoubleMask:
        return DoubleMask()

    def values(self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance) -> tuple[Tensor, None, Tensor]:
        return ev.scores(logits), None, _error(tolerance, logits)

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        return self.label(self._looked_at(images, certify=False).evidence())

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        return self._looked_at(images, certify=True).evidence()

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        return self.number_of_views(image_size)

    def _looked_at(self, images: Float[Tensor, "B C H W"], certify: bool) -> "_Look":
        ev.check_images(images)
        look = _Look(self, images, self.tolerance(images))
        look.at_single_masks()
        look.at_disagreers()
        if certify:
            covers = self._covers[images.shape[2], images.shape[3]]
            look.at_pairs(None if self.maps else covers.to(images.device))
        return look


class _Look:
    """Which views of B pictures have been looked at, and what they say. No answer depends on the other pictures."""

    def __init__(self, defense: PatchCleanser, images: Float[Tensor, "B C H W"], tolerance: ev.Tolerance):
        self.defense, self.images = defense, images
        self.size = images.shape[2], images.shape[3]
        self.views = defense.views_of(self.size)
        self.error = _error(tolerance, images)
        self.table = pair_table(len(self.views.masks)).to(images.device)
        self.known = torch.zeros((len(images), self.views.number(self.size)), dtype=torch.bool, device=images.device)
        self.scores: Float[Tensor, "B V K"] = torch.zeros(0)
        self.answers: Int64[Tensor, "B V"] = torch.zeros(self.known.shape, dtype=torch.int64, device=images.device)
        self.gaps: Float64[Tensor, "B V"] = torch.zeros(self.known.shape, dtype=torch.float64, device=images.device)

    def evidence(self) -> Evidence:
        """What is known; views that were not looked at are unsure: the attacker may have them."""
        return Evidence(self.scores, ~self.known, self.size, self.error, passes=self.known.sum(1))

    def ask(self, wanted: Bool[Tensor, "B V"]) -> None:
        """Look at the wanted views of every picture that are not known yet, in full batches."""
        picture, view = (wanted & ~self.known).nonzero().T
        if len(picture) == 0:
            return
        defense = self.defense
        logits = ev.logits_of(defense.model, self.views, self.images, picture, view.cpu(), defense.batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's answers are not finite; a certificate needs finite logits")
        scores = ev.scores(logits)
        if len(self.scores) == 0:
            self.scores = torch.zeros((*self.known.shape, scores.shape[1]), dtype=scores.dtype, device=scores.device)
        top = scores.double().topk(2, 1).values
        self.scores[picture, view] = scores
        self.answers[picture, view], self.gaps[picture, view] = predictions(scores[None])[0], top[:, 0] - top[:, 1]
        self.known[picture, view] = True

    def at_single_masks(self) -> None:
        """The first round."""
        wanted = torch.zeros_like(self.known)
        wanted[:, self.table.diagonal()] = True
        self.ask(wanted)

    def at_disagreers(self) -> None:
        """The second round: every disagreer with the majority until a pair fails it, likely failures first."""
        alone, sure = self.answers[:, self.table.diagonal()], self.gaps[:, self.table.diagonal()]
        counts = nn.functional.one_hot(alone, self.scores.shape[2]).sum(1)
        left = alone != counts.argmax(1, keepdim=True)
        differs = alone[:, :, None] != alone[:, None]  # second masks that alone say otherwise, the sure ones first
        order = (differs * (1 + sure)[:, None]).argsort(dim=2, descending=True, stable=True)
        first, step = 0, 1
        while first < len(self.table) and bool(left.any()):
            picture, mask = left.nonzero().T
            views = self.table[mask[:, None], order[picture, mask, first : first + step]]
            wanted = torch.zeros_like(self.known)
            wanted[picture[:, None], views] = True
            self.ask(wanted)
            left[picture, mask] = (self.answers[picture[:, None], views] == alone[picture, mask][:, None]).all(1)
            first, step = first + step, 2 * step

    def at_pairs(self, covers: Bool[Tensor, "L M"] | None) -> None:
        """Pairs of masks that have not failed, weakest first; with ``covers`` until the verdict on it is known."""
        label = self.defense.label(self.evidence())[:, None]
        one, other = torch.triu_indices(len(self.table), len(self.table)).to(self.images.device)
        alone = torch.where(self.answers == label, self.gaps, -self.gaps)[:, self.table.diagonal()]
        weakness, step = alone[:, one] + alone[:, other], 4
        while True:
            good = (self.answers == label) & (self.gaps > 2 * self.error[:, None])
            holds = (good | ~self.known)[:, self.table].all(2)  # (B, M): has not failed
            wanted = (holds[:, one] | holds[:, other]) & ~self.known
            if covers is not None:
                proven = (good & self.known)[:, self.table].all(2)
                lost = ~(covers & holds[:, None]).any(2).all(1)
                won = (covers & proven[:, None]).any(2).all(1)
                wanted &= ~(lost | won)[:, None]
            if not bool(wanted.any()):
                return
            now = weakness.masked_fill(~wanted, torch.inf).topk(min(step, wanted.shape[1]), 1, largest=False).indices
            self.ask(torch.zeros_like(wanted).scatter(1, now, True) & wanted)
            step *= 2


def _error(tolerance: ev.Tolerance, images: Float[Tensor, "B C H W"]) -> Float64[Tensor, " B"]:
    return tolerance.of(torch.ones(len(images), dtype=torch.float64, device=images.device))  # scores are at most 1


def covering_masks(
    threats: tuple[PatchThreat, ...], image_size: tuple[int, int], masks: Any, stride: tuple[int, int] | None
) -> tuple[Bool[Tensor, "M H W"], Bool[Tensor, "L M"]]:
    """Masks for pictures of (H, W) pixels, and which of them cover each place of any of the threats.

    Errors: InputError where some place is covered by none, with the number of masks that would do.
    """
    if not isinstance(masks, Tensor):
        masks = mask_set(threats, image_size, masks, stride)
    rows = []
    for threat in threats:
        relation = sees(PixelSets(~masks), threat, image_size)
        found = relation.rows[relation.undominated]
        if bool(found.all(1).any()):
            sides = " or ".join(f"{len(mask)}×{len(mask[0])}" for mask in threat.masks(image_size)[:3])
            raise InputError(
                f"mask set does not cover {f'{threat.count} ' if threat.count > 1 else ''}{sides} patches everywhere in "
                f"pictures of {image_size[0]}×{image_size[1]} pixels; larger masks would, or k ≥ 1 masks per axis"
            )
        rows.append(~found)
    return masks, torch.cat(rows).unique(dim=0)


def mask_settings(defense: Any) -> dict[str, Any]:
    """Settings of a defense that lays masks over pictures."""
    masks = defense.masks
    return {
        "masks": masks.to(torch.uint8).tolist() if isinstance(masks, Tensor) else masks and list(masks),
        "stride": defense.stride and list(defense.stride),
        "fill": list(f) if isinstance(f := defense.model.fill, tuple) else f,
        "threat": [t.to_dict() for t in defense.threats] if len(defense.threats) > 1 else defense.threats[0].to_dict(),
    }


def checked_threats(threat: PatchThreat | Sequence[PatchThreat]) -> tuple[PatchThreat, ...]:
    """One or several patch threats as a tuple. InputError on anything else."""
    threats = (threat,) if isinstance(threat, PatchThreat) else tuple(threat) if isinstance(threat, Sequence) else ()
    if not threats or not all(isinstance(one, PatchThreat) for one in threats):
        raise InputError(f"masks are made for a patch threat, or several, not for {threat}")
    return threats


def per_axis(value: Any, what: str) -> tuple[int, int] | None:
    """A whole number for both axes, or one for each, from 1 to 256. InputError on anything else."""
    pair = (value, value) if isinstance(value, int) else value if value is None else tuple(value)
    if pair is None:
        return None
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 4096 for n in pair):
        raise InputError(f"{what} are a whole number of at least 1, or two for rows and columns, not {value!r}")
    return pair[0], pair[1]


def checked_fill(fill: Any) -> Fill:
    """One value in [0, 1], or a tuple of one per channel. InputError on anything else."""
    values = tuple(fill) if isinstance(fill, tuple | list) else (fill,)
    if not values or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values):
        raise InputError(f"fill is a value in [0, 1], or one per channel, not {fill!r}")
    return tuple(map(float, values)) if isinstance(fill, tuple | list) else float(fill)
