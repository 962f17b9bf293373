"""Datasets from the Hugging Face Hub, through the `datasets` library; only this module imports it."""

import logging
from typing import Any

import pyarrow as pa

from certipatch.data.known import KNOWN, canonical
from certipatch.data.parquet import ArrowStore, bytes_column, find_columns, label_array
from certipatch.data.pictures import SplitContents, choose_split
from certipatch.errors import InputError


def read_hub(hub: str, split: str | None, limit: int | None) -> SplitContents:
    """The images and labels of one split of a Hub dataset, downloaded on first use, memory-mapped from then on.

    Raises InputError, naming the Hub dataset, for any failure such as no network.
    """
    known = KNOWN.get(canonical(hub))
    try:
        return _read(hub, known.config if known else None, split, limit)
    except InputError:
        raise
    except Exception as error:  # datasets, huggingface_hub and the network raise errors of many kinds
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise InputError(
            f"cannot load {hub!r} from the Hub ({reason}); give a folder of its parquet files instead, "
            "or set CERTIPATCH_DATA to a folder that has it"
        ) from None


def _read(hub: str, config: str | None, split: str | None, limit: int | None) -> SplitContents:
    import datasets

    for name in ("huggingface_hub", "datasets"):  # they would report every retry without a network
        logging.getLogger(name).setLevel(logging.ERROR)
    splits: Any = datasets.load_dataset(hub, config)
    split = choose_split(splits.keys(), split, hub)
    data = splits[split]
    image = next((name for name, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if image is not None:
        data = data.cast_column(image, datasets.Image(decode=False))
    table: pa.Table = data.with_format("arrow")[:]
    image, label = find_columns(table.schema, hub)
    labels = label_array(table.column(label), hub)
    if not len(labels):
        raise InputError(f"{hub!r} has no rows in {split!r}; give another split or dataset")
    taken = len(labels) if limit is None else min(limit, len(labels))
    column = bytes_column(table.column(image).slice(0, taken), hub).cast(pa.large_binary())
    class_names = getattr(data.features[label], "names", None)
    store = ArrowStore(column, hub, split)
    return SplitContents(
        split, store, labels[:taken], tuple(class_names) if class_names else None, int(labels.max()) + 1
    )
