"""Load the images of a dataset that the user names."""

import os
import re
import sys

from certipatch.data.decoding import check_size
from certipatch.data.known import KNOWN, SAMPLE, canonical, dataset_names, known_classes
from certipatch.data.pictures import Pictures, SplitContents
from certipatch.errors import InputError, suggestion

DATA_VARIABLE = "CERTIPATCH_DATA"
"""The environment variable that names a folder of known datasets, one folder each."""
_SPLIT = re.compile(r"[A-Za-z0-9_.-]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def load(
    data: str,
    split: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Pictures:
    """The labelled images of one split of a dataset.

    data: a name of `dataset_names()`, a folder, or a Hub id `owner/name`. A known name is read from the folder of that name
    in the folder $CERTIPATCH_DATA if it is there, else from the Hub; write `./mnist` for a folder with the name of a known
    dataset. A folder holds either `SPLIT-*.parquet` files in the Hub's layout, or class folders `SPLIT/CLASS/*.png`
    or `CLASS/*.png`; the last layout has one split, `all`.
    split: default is `test`, else `validation`, else the only split.
    size: (H, W) in pixels that each image is resized and centre-cropped to; default: unchanged.
    channels: 3 turns grey images into colour ones, 1 refuses colour; by default only grey
    images among colour ones are changed.
    limit: the number of images to take, from the beginning.
    seed: the order of the images of class folders; data of other kinds keep their own order.

    Raises InputError for other arguments, and for data that cannot be read.
    """
    data = os.fspath(data)
    check_size(size)
    _check(split, limit, seed)
    limit = None if limit is None else min(limit, sys.maxsize)
    own = _own_folder(data)
    name, source = data, data
    if own is not None:
        raw = _folder(own, split, limit, seed, data)
    elif data in KNOWN:
        source = KNOWN[data].hub
        raw = _hub(source, split, limit)
    elif os.path.isdir(data):
        name = os.path.basename(os.path.abspath(data)) or "root"
        raw = _folder(data, split, limit, seed, data)
    elif os.path.exists(data):
        raise InputError(f"{data!r} is a file; give the folder that holds the dataset, or a dataset name")
    elif _HUB_ID.fullmatch(data):
        name = canonical(data)
        raw = _hub(data, split, limit)
    else:
        raise InputError(_unknown(data))
    names, note = _class_names(raw, name), _note(raw, name)
    return Pictures(name, raw.split, source, raw.labels, names, note, raw.store, size, channels)


def _check(split: str | None, limit: int | None, seed: int) -> None:
    if split is not None and not _SPLIT.fullmatch(split):
        raise InputError(f"split {split!r} is no split name; give a plain name such as test (no slices, no paths)")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit {limit!r} is not a number of pictures; give 1 or more")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed {seed!r} is not a whole number; give 0 or more")


def _own_folder(name: str) -> str | None:
    """The folder of the sample, or the one that $CERTIPATCH_DATA has for a known name; None if there is none."""
    if name == SAMPLE:
        return os.path.join(os.path.dirname(__file__), SAMPLE)
    root = os.environ.get(DATA_VARIABLE)
    folder = os.path.join(root, name) if root and name in KNOWN else ""
    return folder if os.path.isdir(folder) else None


def _folder(root: str, split: str | None, limit: int | None, seed: int, called: str) -> SplitContents:
    try:
        parquet = any(name.endswith(".parquet") for name in os.listdir(root))
    except OSError as error:
        raise InputError(f"cannot read the folder {root!r} ({error.strerror}); check its permissions") from None
    if parquet:
        from certipatch.data.parquet import read_parquet

        return read_parquet(root, split, limit, called)
    from certipatch.data.folder import read_folder

    return read_folder(root, split, limit, seed)


def _hub(hub: str, split: str | None, limit: int | None) -> SplitContents:
    from certipatch.data.hub import read_hub

    return read_hub(hub, split, limit)


def _class_names(raw: SplitContents, name: str) -> tuple[str, ...]:
    """Class names: of the class folders, else the known names, else the names in the data's metadata, else the indices."""
    from certipatch.data.folder import FileStore

    known = None if isinstance(raw.store, FileStore) else known_classes(name)
    for candidate in (known, raw.class_names):
        if candidate is not None and len(candidate) >= raw.classes:
            return candidate
    return tuple(str(i) for i in range(raw.classes))


def _note(raw: SplitContents, name: str) -> str | None:
    """A remark if the data is JPEG although the original dataset is lossless."""
    if name in KNOWN and KNOWN[name].lossless and raw.store.encoded(0).startswith(b"\xff\xd8\xff"):
        return "JPEG-recompressed copy"
    return None


def _unknown(data: str) -> str:
    if "/" in data or os.sep in data:
        return f"there is no folder {data!r}; check the path, or give a dataset name such as {SAMPLE}"
    hint = suggestion(data.lower(), dataset_names(), cutoff=0.5)
    return f"there is no dataset or folder {data!r}, and it is no Hub id owner/name; {hint}"
