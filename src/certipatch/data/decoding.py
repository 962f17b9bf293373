"""Decode image files into pixels; every fault of a file becomes one InputError."""

import io
import os
import stat
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from certipatch.errors import InputError

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The supported image formats; all others are refused before any of their code runs."""
MAX_PIXELS = 64 * 2**20
"""Images of more pixels than this (64 megapixels) are refused before they are decoded."""
MAX_FILE = 256 * 2**20
"""Image files of more bytes than this (256 MB) are refused before they are read."""


def decode(encoded: bytes, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """The pixels of an image, uint8 of shape (H, W, C), with C = 1 for grey and 3 for colour.

    Only the first frame is read and turned by its EXIF orientation; 16-bit grey is scaled to 8 bits; palettes and CMYK
    become RGB; an alpha channel is dropped if it is fully opaque. With `size` = (H, W) in pixels the image is
    resized (bicubic) and centre-cropped to it. `name` is the image's name in errors.

    Raises InputError for bytes that are no image of a format in FORMATS, truncated or damaged images,
    transparency, more than MAX_PIXELS pixels, and pixel types that have no 8-bit meaning.
    """
    check_size(size)
    with warnings.catch_warnings():  # PIL's warnings about odd files; a real fault is an error below
        warnings.simplefilter("ignore")
        return decode_loud(encoded, name, size)


def decode_loud(encoded: bytes, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """`decode` without a check of `size` and without hiding PIL's warnings (hiding is not safe in threads)."""
    if not encoded:
        raise InputError(f"{name!r} is empty (0 bytes); give a picture file")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as probe:
            width, height = probe.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width}x{height}")
            probe.verify()
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            picture.load()
            plain = _plain(ImageOps.exif_transpose(picture), name)
            if size is not None:
                plain = ImageOps.fit(plain, (size[1], size[0]), Image.Resampling.BICUBIC)
            pixels = np.array(plain)
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        raise InputError(f"{name!r} is no picture that can be read; give one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name!r} has more than {MAX_PIXELS:,} pixels; make it smaller first") from None
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, zlib.error, ... for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name!r} is a damaged or truncated picture ({reason}); replace or remove it") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def coloured(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3): a grey image (H, W, 1) with its one channel three times, a colour image unchanged."""
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def read_picture(
    path: str | os.PathLike[str], size: tuple[int, int] | None = None, channels: int | None = None
) -> "torch.Tensor":
    """An image file of the user's own as float32 of shape (C, H, W) in [0, 1]; `size` = (H, W) as in `decode`.

    With `channels` = 3 a grey image becomes a colour one.

    Raises InputError for a missing file, a folder, a file above MAX_FILE bytes, and everything that `decode` refuses.
    """
    import torch

    pixels = decode(read_bytes(path), os.fspath(path), size)
    pixels = coloured(pixels) if channels == 3 else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most MAX_FILE bytes. Raises InputError for anything else."""
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{name!r} is a folder; give a picture file")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{name!r} is not a regular file; give a picture file")
        if status.st_size <= MAX_FILE:
            with open(name, "rb") as file:
                encoded = file.read(MAX_FILE + 1)
            if len(encoded) <= MAX_FILE:
                return encoded
    except FileNotFoundError:
        raise InputError(f"there is no file {name!r}; check the path") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # no permission, a name with a null byte, ...
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {name!r} ({reason}); check the path and its permissions") from None
    raise InputError(f"{name!r} is larger than {MAX_FILE // 2**20} MB; make the picture smaller first")


def check_size(size: tuple[int, int] | None) -> None:
    """Raises InputError if `size` is not None and not a pair (H, W) of whole numbers of pixels from 1 to 8192."""
    if size is None:
        return
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(isinstance(side, (int, np.integer)) and 1 <= side <= 8192 for side in size):
        raise InputError(f"size {size!r} is not (height, width) in pixels, each from 1 to 8192; give e.g. (224, 224)")


def _plain(picture: Image.Image, name: str) -> Image.Image:
    """The image in mode L or RGB, without alpha. Raises InputError for an image with transparency or another type of pixels."""
    mode = picture.mode
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A").getextrema()
        if alpha != (255, 255):
            raise InputError(f"{name!r} has transparency; flatten it first")
    if mode in ("1", "L", "LA", "La"):
        return picture.convert("L")
    if mode in ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr"):
        # through RGBA if a palette has (opaque) alpha; PIL would otherwise warn
        return picture.convert("RGBA").convert("RGB") if mode in ("P", "PA", "RGBa") else picture.convert("RGB")
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() >= 0 and values.max() <= 65535:
            return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
    raise InputError(f"{name!r} has pixels of type {mode}, which has no 8-bit meaning; convert it to 8-bit grey or RGB")
