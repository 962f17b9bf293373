"""Class folders: `ROOT/SPLIT/CLASS/picture.png`, or `ROOT/CLASS/picture.png` with no splits."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np

from certipatch.data.decoding import read_bytes
from certipatch.data.pictures import SplitContents, choose_split
from certipatch.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Endings of image files, in upper or lower case; other files and hidden files are ignored."""
ALL = "all"
"""The name of the only split of a folder that has no split folders."""


@dataclass(frozen=True)
class FileStore:
    """Encoded images in files."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, i: int) -> bytes:
        """The bytes of file i. Raises InputError if it cannot be read."""
        return read_bytes(self.paths[i])

    def where(self, i: int) -> str:
        """The path of file i."""
        return self.paths[i]


def read_folder(root: str, split: str | None, limit: int | None, seed: int) -> SplitContents:
    """The images of one split of a folder of class folders, in an order that is random but fixed by `seed`.

    If folders right under ROOT hold images, these are the classes and the only split is called `all`. Else folders
    right under ROOT are splits and the folders in them classes. A class's index is its position among the sorted names
    of the class folders of all splits, so that a class that a split lacks does not move the others.

    Raises InputError for a folder without images and for a split that is not there.
    """
    try:
        top = _folders(root)
        flat = any(_pictures(os.path.join(root, name)) for name in top)
        for name in top:
            inside, beside = _folders(os.path.join(root, name)), _pictures(os.path.join(root, name))
            if beside and any(_pictures(os.path.join(root, name, folder)) for folder in inside):
                raise InputError(
                    f"{os.path.join(root, name)!r} holds pictures ({beside[0]}, …) beside folders of pictures, so it may be "
                    "a class or a split; move the pictures or the folders elsewhere"
                )
        nested = {ALL: top} if flat else {name: _folders(os.path.join(root, name)) for name in top}
        bases = {ALL: root} if flat else {name: os.path.join(root, name) for name in top}
        counted = {
            name: {label: _pictures(os.path.join(bases[name], label)) for label in classes}
            for name, classes in nested.items()
        }
    except OSError as error:
        raise InputError(f"cannot read the folder {root!r} ({error.strerror}); check its permissions") from None
    counted = {name: classes for name, classes in counted.items() if any(classes.values())}
    if not counted:
        raise InputError(
            f"{root!r} has neither SPLIT-*.parquet files nor class folders of pictures; give ROOT/SPLIT/CLASS/*.png"
        )
    split = choose_split(counted, split, root)
    class_names = tuple(sorted({label for classes in counted.values() for label in classes}))
    files = [(label, file) for label, paths in counted[split].items() for file in paths]
    files.sort(key=lambda pair: _shuffle_key(seed, *pair))
    files = files[:limit]
    index = {label: i for i, label in enumerate(class_names)}
    labels = np.array([index[label] for label, _ in files], np.int64)
    store = FileStore([os.path.join(bases[split], label, file) for label, file in files])
    return SplitContents(split, store, labels, class_names, len(class_names))


def _folders(root: str) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()
        )


def _shuffle_key(seed: int, label: str, file: str) -> bytes:
    """A key to sort by; the order is a shuffle that is the same on every machine and version."""
    return hashlib.sha256(os.fsencode(f"{seed}/{label}/{file}")).digest()
