"""PatchGuard++ (Xiang & Mittal 2021): hide every window of the feature map in turn; a dissenting answer is an alarm."""

from typing import Any, ClassVar, final

from jaxtyping import Float, Float64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.certificate import Notion
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.patchguard import malicious_windows
from certipatch.rules import MaskedDetection
from certipatch.threats import PatchThreat
from certipatch.views import Views


@final
class PatchGuardPlusPlus(ViewDefense):
    """Detects attacks: a certified picture keeps its answer or raises an alarm.

    Args:
        model: a network of local logits, or one that reads bands or blocks.
        threat: the patch that it is built for; windows are as large as its reach.
        views: the bands or blocks; None for a network of local logits.
        threshold: τ: a masked answer counts when its softmax score exceeds it. Larger raises fewer alarms on clean
            pictures and certifies less.
        batch_size: pictures or rendered views per forward pass.
    """

    name: ClassVar[str] = "patchguard-plus-plus"
    notion: ClassVar[Notion] = "detection"
    raw: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat,
        views: Views | None = None,
        threshold: float = 0.5,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        if not isinstance(threat, PatchThreat):
            raise ValueError(f"PatchGuard++ is built for a patch, not for {threat}")
        self.threat, self.threshold = threat, threshold
        self._rules: dict[tuple[int, int], MaskedDetection] = {}
        self.theorem = f"no alarm, and a window that holds all of A leaves y a score > {threshold:g}"

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "threat": self.threat.to_dict()}

    def rule(self, image_size: tuple[int, int]) -> MaskedDetection:
        if image_size not in self._rules:
            windows = malicious_windows(self.views_of(image_size), self.threat, image_size)
            self._rules[image_size] = MaskedDetection(windows, self.threshold)
        return self._rules[image_size]

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, None, Float64[Tensor, " B"]]:
        return logits, None, tolerance.of(logits).flatten(1).amax(1).double()
