"""Training under masks, for double masking: two random masks, or two that hurt, found greedily or by climbing.

A certificate of double masking asks that the answer stays under every two masks. PatchCleanser (Xiang et al., USENIX Security
2022) trains on pictures with two random ones; Saha et al. (TMLR 2023, Greedy Cutout) with the one of largest loss and, that laid
over the picture, the second one of largest loss: 2M passes instead of M(M+1)/2. If the loss
were linear, with its gradient g with respect to the picture x, a mask that paints the value f would add the sum of g·(f − x)
over its pixels. A training that remembers the masks of each picture has that gradient for nothing, from the step that learned
from them, and moves one of the two masks along it for the next time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.training.augment import mixed
from certipatch.training.mask_search import MaskHierarchy, MaskMemory, apply_masks, mask_centres
from certipatch.training.recipe import MaskTraining
from certipatch.views.render import Fill


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """In eval mode, so that statistics stay those of the pictures that are trained on; then as before."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


Targets = Int64[Tensor, " B"] | Float[Tensor, "B K"]  # classes, or the shares that they have in each picture


@final
class MaskLoss:
    """Cross entropy of pictures under two masks each, as a loss for the training.

    Args:
        network: in whose weights the worst masks are looked for, in eval mode and without gradients.
        module: the same network as it is trained.
        masks: from coarse to fine.
        config: the settings of the recipe.
        fill: what masks are painted with.
        precision: in which gradients of pictures are taken: that of ``module``.
        memory: the masks of each picture, for the strategy ``hill-climbing``; set to the batch before each call.
        classes: K, where pictures are mixed.
        mixed_until: the share of the training up to which they are mixed.
        smaller: the smaller masks that some batches learn under, if the recipe says so; all sizes equally often.
    """

    def __init__(
        self,
        network: nn.Module,
        module: nn.Module,
        masks: MaskHierarchy,
        config: MaskTraining,
        fill: Fill,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        memory: MaskMemory | None = None,
        classes: int = 0,
        mixed_until: float = 1.0,
        smaller: Sequence[MaskHierarchy] = (),
    ):
        self.network, self.module, self.masks, self.config, self.fill = network, module, masks, config, fill
        self.larger, self.smaller = masks, smaller
        self.precision, self.memory, self.classes, self.mixed_until = precision, memory, classes, mixed_until
        self.encoding = getattr(network, "encoding", "picture")

    def __call__(
        self, images: Float[Tensor, "B C H W"], targets: Int64[Tensor, " B"], share: float, draw: torch.Generator
    ) -> Float[Tensor, ""]:
        if self.config.mixup_max and share < self.mixed_until:
            images, targets = mixed(images, F.one_hot(targets, self.classes).float(), self.config.mixup_max, draw)
        if self.smaller and share >= self.config.small_mask_start:
            drawn = torch.rand(1, generator=draw).item() / self.config.small_mask_fraction
            self.use_masks(self.smaller[int(drawn * len(self.smaller))] if drawn < 1 else self.larger)
        if self.config.strategy == "hill-climbing" and share >= self.config.climbing_start:
            return self.cross_entropy(self.climbing(images, draw), targets)
        if self.config.strategy == "greedy" and share >= self.config.greedy_start:
            pairs = self.worst(images, targets)
        else:
            candidates = self.config.random_candidates if share >= self.config.random_candidates_start else 1
            pairs = self.drawn(images, targets, candidates, draw)
        return self.cross_entropy(self.shown(images, pairs), targets)

    def use_masks(self, masks: MaskHierarchy) -> None:
        """Use this mask set from now on; remembered positions map to its nearest mask."""
        self.masks = masks
        if self.memory is not None:
            self.memory.of_masks = mask_centres(masks.levels[-1].cpu()).float()

    def shown(self, images: Float[Tensor, "B C H W"], pairs: Int64[Tensor, "B 2"]) -> Float[Tensor, "B C2 H W"]:
        """Pictures under two masks each."""
        return apply_masks(self.encoding, images, self.masks.hidden(pairs), self.fill)

    def cross_entropy(self, shown: Float[Tensor, "B C H W"], targets: Targets) -> Float[Tensor, ""]:
        """The loss of what is shown."""
        return F.cross_entropy(self.module(shown).float(), targets, label_smoothing=self.config.label_smoothing)

    def climbing(self, images: Float[Tensor, "B C H W"], draw: torch.Generator) -> Float[Tensor, "B C2 H W"]:
        """Pictures under their two remembered masks. The backward pass moves one of the two, for the next time."""
        memory = self.memory
        assert memory is not None
        pair = memory.pairs(draw).to(images.device)
        shown = self.shown(images, pair).requires_grad_()
        shown.register_hook(lambda gradient: memory.update(self.propose_move(images, gradient, pair)))
        return shown

    def propose_move(
        self, images: Float[Tensor, "B C H W"], gradient: Float[Tensor, "B C2 H W"], pair: Int64[Tensor, "B 2"]
    ) -> Int64[Tensor, "B 2"]:
        """The pair with one mask in another place whose loss would be largest if it were linear in what is shown."""
        fine = self.masks.levels[-1].flatten(1).to(gradient.dtype)
        nothing = torch.zeros_like(self.masks.levels[-1][:1]).expand(len(images), -1, -1)
        bare, blank = (apply_masks(self.encoding, images, some, self.fill) for some in (nothing, ~nothing))
        gain = (gradient * (blank - bare)).sum(1).flatten(1)
        proposals, reached = [], []
        for kept in pair.T:
            loss = (gain * fine[kept]).sum(1, keepdim=True) + (gain * (1 - fine[kept])) @ fine.T
            loss.scatter_(1, pair, -torch.inf)  # neither mask again
            best = loss.max(1)
            proposals.append(torch.stack([kept, best.indices], dim=1))
            reached.append(best.values)
        better = torch.stack(reached).argmax(0)
        return torch.stack(proposals)[better, torch.arange(len(better), device=better.device)]

    def worst(self, images: Float[Tensor, "B C H W"], targets: Targets) -> Int64[Tensor, "B 2"]:
        """The two greedily chosen masks of each picture."""

        def losses(picture: Tensor, hidden: Tensor) -> Tensor:
            return self.losses(images[picture], targets[picture], hidden)

        return self.masks.worst(losses, len(images), 4 * len(images))

    def drawn(
        self, images: Float[Tensor, "B C H W"], targets: Targets, draws: int, draw: torch.Generator
    ) -> Int64[Tensor, "B 2"]:
        """Two random masks of each picture: of so many draws the one of largest loss."""
        pairs = [self.masks.random(len(images), draw) for _ in range(draws)]
        if draws == 1:
            return pairs[0]
        worst = torch.stack([self.losses(images, targets, self.masks.hidden(pair)) for pair in pairs]).argmax(0)
        return torch.stack(pairs)[worst, torch.arange(len(images), device=worst.device)]

    @torch.no_grad()
    def answers(self, images: Float[Tensor, "N C H W"], hidden: Bool[Tensor, "N H W"]) -> Float[Tensor, "N K"]:
        """Logits of pictures under masks, in the weights as they are now, in eval mode."""
        with eval_mode(self.network):
            return self.module(apply_masks(self.encoding, images, hidden, self.fill)).float()

    def losses(self, images: Tensor, targets: Tensor, hidden: Bool[Tensor, "N H W"]) -> Float[Tensor, " N"]:
        """Their cross entropy."""
        return F.cross_entropy(self.answers(images, hidden), targets, reduction="none")
