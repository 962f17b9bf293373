"""PatchGuard++ (Xiang & Mittal 2021): hide every window of the feature map in turn; a dissenting answer is an alarm."""

from typing import ClassVar, final

from jaxtyping import Float, Float64
from pydantic import Field
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.certificate import Notion
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.patchguard import malicious_windows
from certipatch.defenses.settings import DefenseSettings, Side
from certipatch.rules import MaskedDetection
from certipatch.threats import PatchThreat
from certipatch.views import Views


class DetectionSettings(DefenseSettings):
    """τ, and the patch that it is built for."""

    threshold: float = Field(default=0.5, ge=0, lt=1)
    patch: Side = 5


DEFAULT = DetectionSettings()


@final
class PatchGuardPlusPlus(ViewDefense):
    """Detects attacks: a certified image keeps its answer or raises an alarm.

    Args:
        model: a network of local logits, or one that reads bands or blocks.
        threat: the patch that it is built for; windows are as large as its reach.
        views: the bands or blocks; None for a network of local logits.
        threshold: τ: a masked answer counts when its softmax score exceeds it. Larger raises fewer alarms on clean
            images and certifies less.
        batch_size: images or rendered views per forward pass.
    """

    name: ClassVar[str] = "patchguard-plus-plus"
    notion: ClassVar[Notion] = "detection"
    settings_class = DetectionSettings
    in_words: ClassVar[str] = (
        "The network looks at {views}. The defense hides region after region of them; if another class "
        "then wins with a high score, it raises an alarm. A patch that lies in a hidden region has no say in what is left. "
        "Where what is left says the same as the whole, an attacker can change the answer only at the price of an alarm."
    )
    raw: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat,
        views: Views | None = None,
        threshold: float = DEFAULT.threshold,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        if not isinstance(threat, PatchThreat):
            raise ValueError(f"PatchGuard++ is built for a patch, not for {threat}")
        self.options = DetectionSettings.checked(threshold=threshold)
        self.threat, self.threshold = threat, threshold
        self._rules: dict[tuple[int, int], MaskedDetection] = {}
        self.theorem = f"no alarm, and a window that holds all of A leaves y a score > {threshold:g}"

    def rule(self, image_size: tuple[int, int]) -> MaskedDetection:
        if image_size not in self._rules:
            windows = malicious_windows(self.views_of(image_size), self.threat, image_size)
            self._rules[image_size] = MaskedDetection(windows, self.threshold)
        return self._rules[image_size]

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, None, Float64[Tensor, " B"]]:
        return logits, None, tolerance.of(logits).flatten(1).amax(1).double()
