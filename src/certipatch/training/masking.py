"""Training under masks, for double masking: two random masks, or two that hurt, found greedily or by climbing.

A certificate of double masking asks that the answer stays under every two masks. PatchCleanser (Xiang et al., USENIX Security
2022) trains on pictures with two random ones; Saha et al. (TMLR 2023, Greedy Cutout) with the one of largest loss and, that laid
over the picture, the second one of largest loss: 2M passes instead of M(M+1)/2. ``tries`` looks at a few masks only, those
whose loss would grow most if it were linear: along its gradient g with respect to the picture x, a mask that paints the value f
adds about the sum of g·(f − x) over its pixels. A training that remembers the masks of each picture has that gradient for
nothing, from the step that learned from them, and moves one of the two masks along it for the next time. Where a network is
sure under most masks a gradient says little about others; a search for a few pictures of each step then finds new ones.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int64
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.defenses import PatchCleanser
from certipatch.errors import InputError
from certipatch.training.augment import Changes, mixed
from certipatch.training.recipe import MaskTraining
from certipatch.views import MaskPairs, PixelSets
from certipatch.views.render import Fill, constant

ENCODINGS = ("picture", "fill", "null")


def laid_over(
    encoding: str, images: Float[Tensor, "N C H W"], hidden: Bool[Tensor, "N H W"], fill: Fill = 0.5
) -> Float[Tensor, "N C2 H W"]:
    """Picture i under mask i, as the network reads it: filled, or NULL-encoded. InputError on another encoding."""
    if encoding not in ENCODINGS:
        raise InputError(f"masks lie over whole pictures, but this network reads {encoding}; train a plain classifier")
    if encoding == "null":
        return torch.cat([images, 1 - images], dim=1) * ~hidden[:, None]
    return torch.where(hidden[:, None], constant(images, fill), images)


def masks_of(defense: Any, image_size: tuple[int, int]) -> list[Bool[Tensor, "_ H W"]]:
    """The masks that a defense lays over pictures, True where they hide; of several sizes, the largest first."""
    if isinstance(defense, PatchCleanser):
        return [pairs.masks for pairs in defense.sizes(image_size)]
    found = defense.views_of(image_size)
    if isinstance(found, MaskPairs):
        return [found.masks]
    assert isinstance(found, PixelSets)
    return [~found.visible(image_size)[1:]]  # the first view shows everything


def finer(coarse: Bool[Tensor, "M H W"], fine: Bool[Tensor, "N H W"]) -> Int64[Tensor, "M c"]:
    """The c = ⌈N/M⌉ fine masks that lie most within each coarse one; every fine one is within some coarse one's.

    Shared pixels count, and where they are as many, nearness of the centres.
    """
    within = coarse.flatten(1).double() @ fine.flatten(1).double().T
    distance = torch.cdist(_centres(coarse), _centres(fine))
    score = within / fine.flatten(1).sum(1) - distance / (1e3 * (1 + distance.max()))
    children = -(-len(fine) // len(coarse))
    found = score.topk(children, 1).indices
    missing = torch.ones(len(fine), dtype=torch.bool)
    missing[found.flatten()] = False
    if not bool(missing.any()):
        return found
    adopted: list[list[int]] = [row.tolist() for row in found]
    for orphan in missing.nonzero()[:, 0].tolist():
        adopted[int(score[:, orphan].argmax())].append(orphan)
    longest = max(map(len, adopted))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in adopted])


def _centres(masks: Bool[Tensor, "M H W"]) -> Float[Tensor, "M 2"]:
    weight = masks.double()
    total = weight.sum((1, 2)).clamp(min=1)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in masks.shape[1:])
    return torch.stack([(weight.sum(2) @ rows) / total, (weight.sum(1) @ columns) / total], 1)


@final
class Masks:
    """Mask sets from coarse to fine, and how a training draws two masks of the finest for each picture.

    Args:
        levels: bool (M, H, W) each; the last one is the defense's own.
        device: where masks are looked for, and what is found lies.
    """

    def __init__(self, levels: Sequence[Bool[Tensor, "M H W"]], device: torch.device | None = None):
        children = [finer(one, other) for one, other in itertools.pairwise(levels)]
        self.levels = [level.to(device) for level in levels]
        self.children = [table.to(device) for table in children]

    @property
    def evaluations(self) -> int:
        """Forward passes that the greedy choice from coarse to fine costs a picture."""
        return 2 * (len(self.levels[0]) + sum(table.shape[1] for table in self.children))

    def hidden(self, pairs: Int64[Tensor, "B 2"]) -> Bool[Tensor, "B H W"]:
        """What two masks hide together."""
        return self.levels[-1][pairs].any(1)

    def random(self, batch: int, draw: torch.Generator) -> Int64[Tensor, "B 2"]:
        """Two masks each, drawn on their own (now and then the same one)."""
        fine = self.levels[-1]
        return torch.randint(len(fine), (2, batch), generator=draw).T.to(fine.device)

    def worst(
        self,
        losses: Callable[[Int64[Tensor, " n"], Bool[Tensor, "n H W"]], Float[Tensor, " n"]],
        batch: int,
        step: int,
        tried: Callable[[Bool[Tensor, "B H W"]], Int64[Tensor, "B c"]] | None = None,
    ) -> Int64[Tensor, "B 2"]:
        """The mask of largest loss, and with it laid, the second mask of largest loss.

        With several levels the worst coarse mask is found first, then the worst of the finer ones within it.

        Args:
            losses: of pictures (n,) under masks (n, H, W).
            batch: B, the pictures.
            step: pairs of a picture and a mask that are looked at together.
            tried: the masks of the finest level that are looked at where some pixels are hidden already; None for all.
        """
        levels = self.levels if tried is None else self.levels[-1:]
        hidden = torch.zeros_like(self.levels[0][:1]).repeat(batch, 1, 1)
        device, pair = hidden.device, []
        for _ in range(2):
            every = torch.arange(len(levels[0]), device=device).expand(batch, -1)
            candidates = every if tried is None else tried(hidden)
            worst = candidates[:, 0]
            for level, masks in enumerate(levels):
                picture = torch.arange(batch, device=device).repeat_interleave(candidates.shape[1])
                chosen = candidates.flatten()
                found = [
                    losses(p, masks[c] | hidden[p])
                    for p, c in zip(picture.split(step), chosen.split(step), strict=True)
                ]
                best = torch.cat(found).view(candidates.shape).argmax(1, keepdim=True)
                worst = candidates.gather(1, best)[:, 0]
                if level + 1 < len(levels):
                    candidates = self.children[level][worst]
            hidden = hidden | self.levels[-1][worst]
            pair.append(worst)
        return torch.stack(pair, dim=1)


@final
class Memory:
    """For each picture of a training the two masks that it learns from when it comes up next.

    They are kept as the centres of masks in the picture as it is: shifts and mirroring move what a mask hides. Where such a
    centre lies in a changed picture, the mask whose centre is next to it is meant.

    Args:
        pictures: n, how many there are.
        masks: bool (M, H, W).
    """

    def __init__(self, pictures: int, masks: Bool[Tensor, "M H W"]):
        self.of_masks = _centres(masks.cpu()).float()
        self.centres = torch.full((pictures, 2, 2), torch.nan)
        """Of each picture and mask the row and column; not a number where nothing is known yet."""
        self.chosen = torch.empty(0, dtype=torch.int64)
        self.changes: Changes | None = None
        self.chunk = slice(None)

    def turn_to(self, chosen: Int64[Tensor, " B"], changes: Changes, chunk: slice = slice(None)) -> None:
        """What is asked for and written next is of these pictures, changed in this way; of the share of them in ``chunk``."""
        self.chosen, self.changes, self.chunk = chosen.cpu(), changes, chunk

    def pairs(self, draw: torch.Generator) -> Int64[Tensor, "b 2"]:
        """The two masks of each picture of the share; random ones where nothing is known."""
        assert self.changes is not None
        found = self.changes.shown(self.centres[self.chosen])
        nearest = torch.cdist(found.nan_to_num(), self.of_masks).argmin(-1)
        drawn = torch.randint(len(self.of_masks), nearest.shape, generator=draw)
        return torch.where(found[..., 0].isnan(), drawn, nearest)[self.chunk]

    def keep(self, pairs: Int64[Tensor, "b 2"]) -> None:
        """Write the two masks of each picture of the share."""
        assert self.changes is not None
        points = torch.zeros(len(self.chosen), 2, 2)
        points[self.chunk] = self.of_masks[pairs.cpu()]
        self.centres[self.chosen[self.chunk]] = self.changes.source(points)[self.chunk]

    def meet(self, fabric: Fabric) -> None:
        """Take over what the other processes have written of their shares of the batch."""
        if fabric.world_size == 1:
            return
        own = torch.zeros(len(self.chosen), dtype=torch.bool)
        own[fabric.global_rank :: fabric.world_size] = True  # not a picture that was only taken along
        written = torch.where(own[:, None, None], self.centres[self.chosen], 0.0)
        met = fabric.all_reduce(written.to(fabric.device), reduce_op="sum")
        assert isinstance(met, Tensor)
        self.centres[self.chosen] = met.cpu()


@contextmanager
def as_served(network: nn.Module) -> Iterator[None]:
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
        asked: what the recipe says.
        fill: what masks are painted with.
        precision: in which gradients of pictures are taken: that of ``module``.
        memory: the masks of each picture, for the strategy ``climbing``; turned to the batch before each call.
        classes: K, where pictures are mixed.
        mixed_until: the share of the training up to which they are.
        finer: the smaller masks that some batches learn under, where the recipe asks for that; all sizes equally often.
    """

    def __init__(
        self,
        network: nn.Module,
        module: nn.Module,
        masks: Masks,
        asked: MaskTraining,
        fill: Fill,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        memory: Memory | None = None,
        classes: int = 0,
        mixed_until: float = 1.0,
        finer: Sequence[Masks] = (),
    ):
        self.network, self.module, self.masks, self.asked, self.fill = network, module, masks, asked, fill
        self.larger, self.finer = masks, finer
        self.precision, self.memory, self.classes, self.mixed_until = precision, memory, classes, mixed_until
        self.encoding = getattr(network, "encoding", "picture")

    def __call__(
        self, images: Float[Tensor, "B C H W"], targets: Int64[Tensor, " B"], share: float, draw: torch.Generator
    ) -> Float[Tensor, ""]:
        if self.asked.mix and share < self.mixed_until:
            images, targets = mixed(images, F.one_hot(targets, self.classes).float(), self.asked.mix, draw)
        if self.finer and share >= self.asked.finer_from:
            drawn = torch.rand(1, generator=draw).item() / self.asked.finer
            self._turn_to(self.finer[int(drawn * len(self.finer))] if drawn < 1 else self.larger)
        if self.asked.strategy == "climbing" and share >= self.asked.climbing_from:
            return self.cross_entropy(self.climbing(images, targets, draw), targets)
        if self.asked.strategy == "greedy" and share >= self.asked.greedy_from:
            pairs = self.worst(images, targets)
        else:
            pairs = self.drawn(images, targets, self.asked.draws if share >= self.asked.draws_from else 1, draw)
        return self.cross_entropy(self.shown(images, pairs), targets)

    def _turn_to(self, masks: Masks) -> None:
        """Lay these from now on; where those of a picture are remembered, the nearest."""
        self.masks = masks
        if self.memory is not None:
            self.memory.of_masks = _centres(masks.levels[-1].cpu()).float()

    def shown(self, images: Float[Tensor, "B C H W"], pairs: Int64[Tensor, "B 2"]) -> Float[Tensor, "B C2 H W"]:
        """Pictures under two masks each."""
        return laid_over(self.encoding, images, self.masks.hidden(pairs), self.fill)

    def cross_entropy(self, shown: Float[Tensor, "B C H W"], targets: Targets) -> Float[Tensor, ""]:
        """The loss of what is shown."""
        return F.cross_entropy(self.module(shown).float(), targets, label_smoothing=self.asked.label_smoothing)

    def climbing(
        self, images: Float[Tensor, "B C H W"], targets: Targets, draw: torch.Generator
    ) -> Float[Tensor, "B C2 H W"]:
        """Pictures under their two remembered masks, or, the first ones of a batch, under two that are searched for.

        The backward pass moves one of the two, for the next time.
        """
        memory = self.memory
        assert memory is not None
        pair = memory.pairs(draw).to(images.device)
        first = math.ceil(self.asked.searched * len(images))
        if first:  # as many passes in all processes, which wait for each other
            pair[:first] = self.worst(images[:first], targets[:first])
        shown = self.shown(images, pair).requires_grad_()
        shown.register_hook(lambda gradient: memory.keep(self.moved(images, gradient, pair)))
        return shown

    def moved(
        self, images: Float[Tensor, "B C H W"], gradient: Float[Tensor, "B C2 H W"], pair: Int64[Tensor, "B 2"]
    ) -> Int64[Tensor, "B 2"]:
        """The pair with one mask in another place whose loss would be largest if it were linear in what is shown."""
        fine = self.masks.levels[-1].flatten(1).to(gradient.dtype)
        nothing = torch.zeros_like(self.masks.levels[-1][:1]).expand(len(images), -1, -1)
        bare, blank = (laid_over(self.encoding, images, some, self.fill) for some in (nothing, ~nothing))
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

        def tried(hidden: Tensor) -> Tensor:
            assert self.asked.tries is not None
            return self.gains(images, targets, hidden).topk(self.asked.tries, 1).indices

        return self.masks.worst(losses, len(images), 4 * len(images), None if self.asked.tries is None else tried)

    def gains(
        self, images: Float[Tensor, "B C H W"], targets: Targets, hidden: Bool[Tensor, "B H W"]
    ) -> Float[Tensor, "B M"]:
        """What each further mask would add to a picture's loss if the loss were linear in what the network reads."""
        shown = laid_over(self.encoding, images, hidden, self.fill).requires_grad_()
        blank = laid_over(self.encoding, images, torch.ones_like(hidden), self.fill)
        with as_served(self.network), torch.enable_grad(), self.precision():
            loss = F.cross_entropy(self.network(shown).float(), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, shown)
        change = (gradient * (blank - shown.detach())).sum(1).flatten(1)
        return change @ self.masks.levels[-1].flatten(1).to(change.dtype).T

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
        with as_served(self.network):
            return self.module(laid_over(self.encoding, images, hidden, self.fill)).float()

    def losses(self, images: Tensor, targets: Tensor, hidden: Bool[Tensor, "N H W"]) -> Float[Tensor, " N"]:
        """Their cross entropy."""
        return F.cross_entropy(self.answers(images, hidden), targets, reduction="none")
