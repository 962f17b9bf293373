"""Labelled images that stay encoded until someone reads their pixels."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, final

import numpy as np

from certipatch.data.decoding import coloured, decode, decode_loud
from certipatch.errors import InputError

if TYPE_CHECKING:
    import torch

MAX_DECODED = 4 * 2**30
"""`Pictures.decode_all` refuses to fill more bytes than this (4 GiB)."""
MAX_CLASSES = 100_000
"""Labels from this number on are refused: they are no class indices."""
_CHUNK = 256


class Store(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image i, 0 <= i < len."""
        ...

    def where(self, i: int) -> str:
        """The name of image i in errors, such as its file."""
        ...


@dataclass(frozen=True)
class SplitContents:
    """One split as a reader returns it: images, labels int64 (N,), and class names if the data has them.

    `classes` is the number of classes in the data, including images beyond a limit.
    """

    split: str
    store: Store
    labels: np.ndarray
    class_names: tuple[str, ...] | None
    classes: int


@final
@dataclass(frozen=True, eq=False, repr=False)
class Pictures:
    """N labelled images of one split of a dataset, decoded on demand.

    name: the dataset's known name, or the folder's own name (never a path). split: the split's name.
    source: the path or Hub id as it was given. labels: int64 (N,). class_names: one per class.
    note: one remark for reports, or None. store: the encoded images. size: (H, W) that each image is resized
    and centre-cropped to, or None. channels: 3 turns grey images into colour ones, and 1 refuses colour; None turns grey
    ones if both occur together.
    """

    name: str
    split: str
    source: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    note: str | None
    store: Store
    size: tuple[int, int] | None = None
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Pictures({self.name!r}, {self.split!r}, {len(self)} pictures, {len(self.class_names)} classes)"

    def in_order_of(self, classes: Sequence[str]) -> "Pictures":
        """These images with classes numbered as in ``classes``, if the names are the same in another order."""
        order = {name.casefold(): number for number, name in enumerate(classes)}
        own = [name.casefold() for name in self.class_names]
        if len(order) != len(own) or sorted(order) != sorted(own) or list(order) == own:
            return self
        renumbered = np.array([order[name] for name in own], dtype=np.int64)
        return replace(self, labels=renumbered[self.labels], class_names=tuple(classes))

    def encoded(self, i: int) -> bytes:
        """The encoded bytes (PNG, JPEG, ...) of image i. Raises InputError if there is no image i."""
        if not 0 <= i < len(self):
            raise InputError(f"there is no picture {i} in {self.name} {self.split}; give 0 to {len(self) - 1}")
        return self.store.encoded(int(i))

    def sha256(self, i: int) -> str:
        """The SHA-256 of the encoded bytes of image i, as 64 hex digits."""
        return hashlib.sha256(self.encoded(i)).hexdigest()

    def fingerprint(self) -> str:
        """64 hex digits that identify these images, their order and labels (not `size`).

        The SHA-256 over, for each image in turn, the 32 bytes of its SHA-256 and its label as 8 bytes, least first.
        """
        total = hashlib.sha256()
        for i, label in enumerate(self.labels.astype("<i8")):
            total.update(hashlib.sha256(self.encoded(i)).digest())
            total.update(label.tobytes())
        return total.hexdigest()

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """The images at `indices` as uint8 of shape (B, H, W, C). Raises InputError if they differ in size."""
        arrays = [decode(self.encoded(i), self.store.where(i), self.size) for i in indices]
        if not arrays:
            raise InputError("no indices were given; give at least one picture index")
        for i, array in zip(indices, arrays, strict=True):
            if self.channels is not None and array.shape[2] > self.channels:
                raise InputError(f"{self.store.where(i)!r} is RGB, but grey pictures are needed; convert it first")
        if self.channels == 3 or len({array.shape[2] for array in arrays}) > 1:
            arrays = [coloured(array) for array in arrays]
        for i, array in zip(indices, arrays, strict=True):
            self._check_same(indices[0], arrays[0], i, array)
        return np.stack(arrays)

    def images(self, indices: Sequence[int]) -> "torch.Tensor":
        """The images at `indices` as float32 of shape (B, C, H, W) in [0, 1]. Errors as `pixels`."""
        import torch

        return torch.from_numpy(self.pixels(indices)).permute(0, 3, 1, 2).contiguous().float() / 255

    def decode_all(self, threads: int | None = None) -> "torch.Tensor":
        """All images as uint8 of shape (N, C, H, W), decoded in `threads` threads (default: one per core).

        Raises InputError if they differ in size or would fill more than MAX_DECODED bytes.
        """
        try:
            return self._decode_all(threads)
        except _Colour:
            return replace(self, channels=3)._decode_all(threads)

    def _decode_all(self, threads: int | None) -> "torch.Tensor":
        """Decode all images. Raises _Colour at a colour image if the first one is grey."""
        import torch

        first = self.pixels([0])[0]
        height, width, channels = first.shape
        total = len(self) * first.size
        if total > MAX_DECODED:
            raise InputError(
                f"{len(self):,} pictures of {height}x{width}x{channels} need {total / 2**30:.1f} GiB decoded, "
                f"above {MAX_DECODED / 2**30:.0f} GiB; give a smaller size or a limit"
            )
        out = np.empty((len(self), channels, height, width), np.uint8)

        def fill(start: int) -> None:
            for i in range(start, min(start + _CHUNK, len(self))):
                array = decode_loud(self.encoded(i), self.store.where(i), self.size)
                if array.shape[2] > channels:
                    raise _Colour
                array = coloured(array) if channels == 3 else array
                self._check_same(0, first, i, array)
                out[i] = array.transpose(2, 0, 1)

        with warnings.catch_warnings(), ThreadPoolExecutor(max(1, threads or os.cpu_count() or 1)) as pool:
            warnings.simplefilter("ignore")
            try:
                _exhaust(pool.map(fill, range(0, len(self), _CHUNK)))
            except BaseException:  # the first bad image, or Ctrl-C: do not decode the rest
                pool.shutdown(cancel_futures=True)
                raise
        return torch.from_numpy(out)

    def _check_same(self, i: int, first: np.ndarray, j: int, other: np.ndarray) -> None:
        if first.shape != other.shape:
            one, two = (f"{self.store.where(k)!r} ({a.shape[0]}x{a.shape[1]})" for k, a in ((i, first), (j, other)))
            raise InputError(f"pictures {one} and {two} differ in size; give a size")


class _Colour(Exception):
    """A colour image among grey ones."""


def choose_split(splits: Iterable[str], wanted: str | None, source: str) -> str:
    """The wanted split; without one `test`, else `validation` or `val`, else the only one. Raises InputError otherwise."""
    there = sorted(splits)
    if not there:
        raise InputError(f"{source!r} has no splits with pictures; give another dataset or folder")
    if wanted is None:
        if len(there) == 1:
            return there[0]
        wanted = next((name for name in ("test", "validation", "val") if name in there), None)
        if wanted is None:
            raise InputError(f"{source!r} has several splits; give one of {listed(there)}")
    if wanted not in there:
        raise InputError(f"{source!r} has no split {wanted!r}; give one of {listed(there)}")
    return wanted


def check_labels(labels: np.ndarray, source: str) -> None:
    """Raises InputError for labels that are no class indices: negative (an unlabelled split) or far too large."""
    for bad in labels[(labels < 0) | (labels >= MAX_CLASSES)][:1]:
        raise InputError(
            f"{source!r} has the label {bad}, which is no class index (0 to {MAX_CLASSES - 1}); give a labelled split"
        )


def listed(names: Iterable[str]) -> str:
    """Up to 20 names in one line, for an error; names that do not print well are quoted and escaped."""
    shown = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")


def _exhaust(results: Iterable[object]) -> None:
    for _ in results:
        pass
