"""Vulnerability maps and images as data URIs."""

import base64
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

# From a margin near zero to the largest one. Orange-red and blue stay apart in every common colour blindness.
RED = ((252, 190, 165), (251, 106, 74), (203, 24, 29), (110, 0, 16))
BLUE = ((200, 221, 240), (107, 174, 214), (33, 113, 181), (8, 48, 107))
UNREACHED = (150, 150, 150)
LONGEST = 384  # pixels of a side; larger images are made smaller
LOSSLESS = 64  # pixels of a side up to which an image keeps its pixels


def colours(margins: np.ndarray, scale: float) -> np.ndarray:
    """Colours of a map of margins (H, W), as uint8 (H, W, 3).

    Margins ≤ 0 (or NaN) are red: a patch there may change the prediction. Margins > 0 are blue: no patch can. Colours
    darken away from zero, up to ±scale. +inf is grey: no patch reaches this pixel, or none has any effect.
    """
    strength = np.clip(np.nan_to_num(np.abs(margins) / scale, nan=1.0, posinf=1.0), 0, 1)
    out = np.where((margins > 0)[..., None], _ramp(BLUE, strength), _ramp(RED, strength))
    out[np.isposinf(margins)] = UNREACHED
    return out


def common_scale(maps: Iterable[np.ndarray]) -> float:
    """The largest finite |margin| of some maps, so that their colours can be compared; 1 if all are zero."""
    largest = [float(np.abs(margins[np.isfinite(margins)]).max(initial=0)) for margins in maps]
    return max(largest, default=0.0) or 1.0


def gradient() -> str:
    """The map's colours from −scale to +scale, as a CSS gradient with its step at zero."""
    red = [f"rgb({r},{g},{b}) {50 * i / (len(RED) - 1):.4g}%" for i, (r, g, b) in enumerate(reversed(RED))]
    blue = [f"rgb({r},{g},{b}) {50 + 50 * i / (len(BLUE) - 1):.4g}%" for i, (r, g, b) in enumerate(BLUE)]
    return f"linear-gradient(to right,{','.join(red + blue)})"


def png(pixels: np.ndarray, *, smooth: bool = True) -> str:
    """A uint8 image (H, W, 1 or 3) as a PNG data URI; an image above LONGEST pixels a side is made smaller."""
    return data_uri(_small(pixels, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST))


def picture(pixels: np.ndarray) -> str:
    """An image as a data URI: PNG up to LOSSLESS pixels a side, else JPEG, which takes a tenth of the bytes."""
    small = _small(pixels, Image.Resampling.LANCZOS)
    return data_uri(small, photo=max(small.size) > LOSSLESS)


def data_uri(image: Image.Image, *, photo: bool = False) -> str:
    """An image as a PNG data URI; as JPEG if it is a photo."""
    file = io.BytesIO()
    if photo:
        image.save(file, "JPEG", quality=85, subsampling=0)
    else:
        image.save(file, "PNG", optimize=True)
    return f"data:image/{'jpeg' if photo else 'png'};base64," + base64.b64encode(file.getvalue()).decode()


def _small(pixels: np.ndarray, how: Image.Resampling) -> Image.Image:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((LONGEST, LONGEST), how)
    return image


def _ramp(stops: tuple[tuple[int, int, int], ...], strength: np.ndarray) -> np.ndarray:
    at = np.linspace(0, 1, len(stops))
    channels = [np.interp(strength, at, [stop[channel] for stop in stops]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
