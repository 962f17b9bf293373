"""Certify your own network: any nn.Module that reads ablated pictures, here an untrained one.

python examples/own_network.py
"""

import torch
from torch import nn

import certipatch as cp


class Small(nn.Module):
    """Reads views (N, 2C, H, W): [x, 1 − x], with zeros for hidden pixels. Gives logits (N, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(6, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        return self.layers(views)


def main() -> None:
    torch.manual_seed(0)
    network = Small().eval()
    images = torch.rand(8, 3, 32, 32)
    network(torch.zeros(1, 6, 32, 32))
    defense = cp.DerandomizedSmoothing(network, cp.views.Columns(4), threshold=None)
    certificate = defense.certify(images, cp.PatchThreat(5))
    print("labels   ", certificate.label.tolist())
    print("certified", certificate.certified.tolist())
    print("margins  ", certificate.margin.amin(1).tolist())


if __name__ == "__main__":
    main()
