"""Certify photographs with a timm model. Needs: pip install timm (and torchvision), and a network the first time.

python examples/any_timm.py PHOTO...

The same from the command line:
certipatch certify PHOTO... --model timm:resnet18.a1_in1k --defense patchcleanser --patch 2% --set masks=3
"""

import sys

import torch

import certipatch as cp
from certipatch.data import read_picture
from certipatch.models.adapters import open_model


def main(photos: list[str]) -> None:
    model, threat = open_model("timm:resnet18.a1_in1k"), cp.PatchThreat("2%")
    pictures = torch.stack([read_picture(photo, model.image_size, 3) for photo in photos])
    certificate = cp.PatchCleanser(model, threat, masks=3).certify(pictures, threat)
    names = model.classes or tuple(map(str, range(1000)))
    for photo, label, certified in zip(photos, certificate.label.tolist(), certificate.certified.tolist(), strict=True):
        print(f"{photo}: {names[label]}, {'certified' if certified else 'not certified'}")


if __name__ == "__main__":
    main(sys.argv[1:])
