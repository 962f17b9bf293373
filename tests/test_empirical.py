"""LGS and DW: as published, on pictures where the answer is known; they predict and cannot certify."""

import math

import pytest
import torch
from torch import nn

from certipatch.attacks import Victim, certifies
from certipatch.defenses import METHODS, DigitalWatermarking, LocalGradientsSmoothing
from certipatch.defenses.local_gradients_smoothing import sharpness
from certipatch.errors import InputError


class Region(nn.Module):
    """Class 1 where the pixels at rows and columns 8 to 13 are bright; nothing else counts."""

    def forward(self, pictures):
        inside = pictures[:, :, 8:14, 8:14].mean((1, 2, 3))
        return 10 * torch.stack([torch.full_like(inside, 0.5), inside], 1)


def literal_lgs(image, window, overlap, threshold, smoothing):
    """The paper's formula, pixel by pixel, for one picture of 24 pixels a side and windows of 12."""
    grey = image.mean(0)
    n = len(grey)
    size = torch.zeros(n, n)
    for y in range(n):
        for x in range(n):
            down = grey[y + 1, x] - grey[y, x] if y + 1 < n else 0.0
            across = grey[y, x + 1] - grey[y, x] if x + 1 < n else 0.0
            size[y, x] = math.sqrt(float(down) ** 2 + float(across) ** 2)
    size = (size - size.min()) / (size.max() - size.min())
    starts = [*range(0, n - window, window - overlap), n - window]
    kept = torch.zeros(n, n)
    for top in starts:
        for left in starts:
            if size[top : top + window, left : left + window].mean() > threshold:
                kept[top : top + window, left : left + window] = 1
    return image * (1 - (smoothing * size * kept).clamp(0, 1))


def test_lgs_is_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    image = 0.3 + 0.02 * torch.rand((3, 24, 24), generator=generator)
    image[:, 2:8, 3:9] = torch.rand((3, 6, 6), generator=generator).round()
    defense = LocalGradientsSmoothing(Region().eval(), window=6, overlap=2, threshold=0.1, smoothing=2.3)
    cleaned = defense.cleaned(image[None])[0]
    assert torch.allclose(cleaned, literal_lgs(image, 6, 2, 0.1, 2.3), atol=1e-4)
    assert (cleaned[:, 3:7, 4:8] < image[:, 3:7, 4:8]).any()
    assert torch.equal(cleaned[:, 15:, 15:], image[:, 15:, 15:])  # calm windows are left alone


def test_lgs_leaves_a_flat_picture_and_is_differentiable():
    defense = LocalGradientsSmoothing(Region().eval())
    flat = torch.full((2, 1, 28, 28), 0.5)
    assert torch.allclose(defense.cleaned(flat), flat)
    noisy = torch.rand((2, 1, 28, 28), generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(defense.cleaned(noisy).sum(), noisy)
    assert torch.isfinite(gradient).all()
    scaled = sharpness(noisy.detach())
    assert scaled.amin() == 0
    assert torch.allclose(scaled.amax((1, 2)), torch.ones(2))


def test_dw_masks_the_dense_salient_region_and_paints_it_over():
    defense = DigitalWatermarking(Region().eval(), pixel_fraction=0.06)
    images = torch.full((2, 1, 28, 28), 0.2)
    images[0, :, 8:14, 8:14] = 0.9
    mask = defense.mask(images)
    assert mask[0, 9:13, 9:13].all()
    assert not mask[0, :4].any()
    assert not mask[0, 20:].any()
    assert torch.allclose(defense.cleaned(images)[0, :, 9:13, 9:13], torch.full((1, 4, 4), 0.2), atol=0.05)
    assert defense.predict(images).tolist() == [0, 0]  # what the network relied on is gone
    assert Region()(images).argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("method", [LocalGradientsSmoothing, DigitalWatermarking])
def test_they_predict_and_cannot_certify(method):
    defense = method(Region().eval())
    assert not hasattr(defense, "certify")
    assert not hasattr(defense, "certificate")
    assert not certifies(defense)
    assert METHODS[defense.name] is method
    images = torch.rand((5, 1, 28, 28), generator=torch.Generator().manual_seed(2))
    together = defense.predict(images)
    assert torch.equal(together, torch.cat([defense.predict(image[None]) for image in images]))
    with torch.inference_mode():
        assert torch.equal(defense.predict(images), together)
    with pytest.raises(InputError, match="divide by 255"):
        defense.predict(images * 255)
    with pytest.raises(InputError, match="training mode"):
        method(Region().train()).check(images)
    adaptive, plain = (Victim(defense, way).leads(images, torch.Generator()) for way in (True, False))
    assert torch.equal(adaptive.argmax(1), together)  # the loss looks through the defense
    assert torch.equal(plain.argmax(1), Region()(images).argmax(1))


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match="overlap"):
        LocalGradientsSmoothing(Region(), window=4, overlap=4)
    with pytest.raises(InputError, match="threshold"):
        LocalGradientsSmoothing(Region(), threshold=2)
    with pytest.raises(InputError, match="odd"):
        DigitalWatermarking(Region(), window_size=4)
    with pytest.raises(InputError, match="pixel_fraction"):
        DigitalWatermarking(Region(), pixel_fraction=0)
