"""Certify a classifier of your own, here an untrained one, with PatchCleanser.

python examples/any_module.py

From the command line, in this folder:
certipatch certify PHOTO --model any_module:classifier --defense patchcleanser --patch 4 --set masks=3
"""

import torch
from torch import nn

import certipatch as cp


class Small(nn.Module):
    """Reads pictures (N, 3, H, W) in [0, 1] and normalises them itself. Gives logits (N, K)."""

    classes = ("cat", "dog", "neither")
    image_size = (32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 3)
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers((pictures - 0.45) / 0.25)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def main() -> None:
    threat = cp.PatchThreat(4)
    defense = cp.PatchCleanser(classifier(), threat, masks=3)
    certificate = defense.certify(torch.rand(8, 3, 32, 32), threat)
    print("answers  ", [Small.classes[label] for label in certificate.label])
    print("certified", certificate.certified.tolist())


if __name__ == "__main__":
    main()
