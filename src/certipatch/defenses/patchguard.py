"""PatchGuard (Xiang et al. 2021): robust masking of local evidence, with the certificate of ``rules.RobustMask``."""

import math
from typing import ClassVar, Literal, final

from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.defenses.settings import DefenseSettings, Side
from certipatch.rules import ProductWindows, RobustMask, Windows
from certipatch.threats import PatchThreat
from certipatch.views import Bands, Blocks, Cross, ReceptiveFields, Views
from certipatch.views.incidence import sees

Kind = Literal["logits", "confidence", "sigmoid", "prediction"]


class PatchGuardSettings(DefenseSettings):
    """T, the kind of evidence and its limit, and the patch that it is built for: whatever the threat with ``ignore_threat``."""

    renamed: ClassVar[dict[str, str]] = {"evidence": "score_type", "fixed": "ignore_threat"}

    score_type: Kind | None = None
    threshold: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=None, gt=0)
    patch: Side = 5
    ignore_threat: bool = False


DEFAULT = PatchGuardSettings()


def malicious_windows(views: Views, threat: PatchThreat, image_size: tuple[int, int]) -> Windows | ProductWindows:
    """The windows that one patch can touch: the undominated rows of ``sees``, as boxes or runs where they are some.

    For receptive fields of r pixels at stride s these are the windows of ⌈(p + r − 1)/s⌉ cells of the paper's
    equation 2, cut at the border and around the end of bands that wrap.
    """
    relation = sees(views, threat, image_size)
    rows = relation.rows[relation.undominated]
    if isinstance(views, Cross):
        first, second = (part.unique(dim=0) for part in rows.split([p.number(image_size) for p in views.parts], dim=1))
        if len(first) * len(second) == len(rows):  # any column with any row
            return ProductWindows(Windows.from_masks(first), Windows.from_masks(second))
    grid = (1, rows.shape[1])
    if isinstance(views, ReceptiveFields):
        grid = views.grid
    elif isinstance(views, Blocks) and views.count == 1:
        tops, lefts = views.starts(image_size)
        grid = (len(tops), len(lefts))
    factors = Windows.boxes(grid, (1, 1)).factor(rows)
    return Windows.from_masks(rows) if factors is None else factors[0]


@final
class PatchGuard(ViewDefense):
    """Every class loses its heaviest window of evidence; windows are as large as the patch's reach.

    Args:
        model: a network of local logits (Mask-BN), or one that reads bands or blocks (Mask-DS).
        threat: the patch that it is built for: masking, and so the answer, depends on it.
        views: for Mask-DS the bands or blocks; None for a network of local logits.
        score_type: ``logits``, ``confidence`` (softmax), ``sigmoid`` (each class on its own, so that a view may speak for
            several or none) or ``prediction`` (one vote for the top class).
        threshold: T in [0, 1]; 0 always masks, 1 never.
        clip: largest logit that counts, None for no limit; all other evidence ends at 1. Negative evidence counts as 0.
        ignore_threat: it stays built for ``threat`` whatever it is evaluated against, so that one answer has certificates for
            all sizes, and a largest certified patch.
        batch_size: images or rendered views per forward pass.

    Certificates for any other threat keep the label; a patch that reaches beyond every window is seldom certified.
    """

    name: ClassVar[str] = "patchguard"
    settings_class = PatchGuardSettings
    in_words: ClassVar[str] = (
        "The network looks at {views}, and says for each how much it speaks for every class. Before adding up, "
        "every class loses the region that speaks loudest for it, a region as large as the patch can reach. The certificate "
        "compares, place by place, the least that the answer can be left with against the most that any rival can reach."
    )

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat,
        views: Views | None = None,
        score_type: Kind | None = DEFAULT.score_type,
        threshold: float = DEFAULT.threshold,
        clip: float | None = DEFAULT.clip,
        ignore_threat: bool = DEFAULT.ignore_threat,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        if not isinstance(threat, PatchThreat):
            raise ValueError(f"PatchGuard is built for a patch, not for {threat}")
        self.threat = threat
        self.kind: Kind = score_type or ("confidence" if isinstance(views, Bands | Blocks | Cross) else "logits")
        largest = math.inf if clip is None else clip
        self.clip = largest if self.kind == "logits" else min(largest, 1.0)
        self.options = PatchGuardSettings.checked(
            score_type=self.kind,
            threshold=threshold,
            clip=None if math.isinf(self.clip) else self.clip,
            ignore_threat=ignore_threat,
        )
        self.threshold, self.ignore_threat = threshold, ignore_threat
        self.raw = self.kind in ("logits", "sigmoid")  # type: ignore[misc]
        self._rules: dict[tuple[int, int], RobustMask] = {}
        self.theorem = RobustMask(Windows.runs(1, 1), threshold, self.clip).theorem

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"] | None:
        return self._largest_patch(evidence) if self.ignore_threat else None

    def rule(self, image_size: tuple[int, int]) -> RobustMask:
        if image_size not in self._rules:
            windows = malicious_windows(self.views_of(image_size), self.threat, image_size)
            self._rules[image_size] = RobustMask(windows, self.threshold, self.clip)
        return self._rules[image_size]

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, Bool[Tensor, "B V"] | None, Float64[Tensor, " B"] | None]:
        return local_evidence(self.kind, logits, tolerance)


def local_evidence(
    kind: Kind, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
) -> tuple[Tensor, Bool[Tensor, "B V"] | None, Float64[Tensor, " B"] | None]:
    """Evidence of a kind, with the views whose prediction rounding could turn, or how far its scores may be off."""
    if kind == "prediction":
        return *ev.votes(ev.scores(logits), None, tolerance), None
    values = logits if kind == "logits" else logits.float().sigmoid() if kind == "sigmoid" else ev.scores(logits)
    return values, None, tolerance.of(values).flatten(1).amax(1).double()
