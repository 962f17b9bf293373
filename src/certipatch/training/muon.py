"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, for the hidden layers of a network."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that takes singular values to about 1 in five steps
RMS = 0.2  # of a step per entry, as AdamW's is: rates and weight decay can be shared with it


@final
class Muon(torch.optim.Optimizer):
    """Muon for the hidden convolutions and linear layers of a network, AdamW for all else.

    A hidden weight (out, …), as a matrix (out, n), moves along its Nesterov momentum with all singular values made about
    1, times 0.2·√max(out, n), so that entries move as far as AdamW's would. The first convolution, the last linear layer
    and all vectors are AdamW's.

    Args:
        network: whose parameters are trained.
        lr: rate of both.
        weight_decay: of both, times the rate.
        momentum: of the hidden matrices.
    """

    def __init__(self, network: nn.Module, lr: float, weight_decay: float, momentum: float = 0.95):
        every = list(network.parameters())
        matrices = [p for p in every if p.ndim > 1][1:-1]
        hidden = set(map(id, matrices))
        groups = [
            {"params": matrices, "hidden": True},
            {"params": [p for p in every if id(p) not in hidden], "hidden": False},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. Closures are not called."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            (self._matrices if group["hidden"] else self._others)(moved, group)

    def _matrices(self, moved: list[Tensor], group: dict[str, Any]) -> None:
        for p in moved:
            gradient, state = p.grad, self.state[p]
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            along = gradient.lerp(state["momentum"], group["momentum"])
            direction = orthogonal(along.flatten(1)).view_as(p)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(direction, alpha=-group["lr"] * RMS * max(len(p), p[0].numel()) ** 0.5)

    def _others(self, moved: list[Tensor], group: dict[str, Any]) -> None:
        for p in moved:
            if not self.state[p]:
                zero = torch.zeros_like(p)
                self.state[p] |= {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
        kept = [[self.state[p][name] for p in moved] for name in ("exp_avg", "exp_avg_sq", "step")]
        means, squares, steps = kept
        adamw(
            moved, [g for p in moved if (g := p.grad) is not None], means, squares, [], steps,
            amsgrad=False, beta1=0.9, beta2=0.999, lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8,
            maximize=False,
        )  # fmt: skip


def orthogonal(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """The matrix with all singular values about 1 (0.7 to 1.2), by five Newton-Schulz steps in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    turned = len(x) > x.shape[1]
    x = x.T if turned else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if turned else x).to(matrix.dtype)
