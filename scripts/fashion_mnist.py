"""Writes Fashion-MNIST, as Debian's package dataset-fashion-mnist ships it, as a Hub-layout folder of parquet files.

    python scripts/fashion_mnist.py OUT [--idx FOLDER]     # OUT/train-00000-of-00001.parquet and OUT/test-...
    python scripts/fashion_mnist.py OUT --sample [1000]    # only the first pictures of the test split

Pictures are stored as PNG, which is lossless.
"""

import argparse
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from certipatch.data.known import KNOWN

FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file, of the shape that its header states."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no IDX file of bytes")
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", ndim, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def png(pixels: np.ndarray) -> bytes:
    """A picture, uint8 (H, W), as PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Images uint8 (N, H, W) and labels (N,) as one parquet file in the Hub's layout, class names in its metadata."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(KNOWN["fashion-mnist"].classes), "_type": "ClassLabel"},
    }
    rows = [{"bytes": png(image), "path": None} for image in images]
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.table({"image": rows, "label": labels.astype(np.int64)}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", row_group_size=1000)
    print(f"{path}: {len(labels)} pictures, {path.stat().st_size:,} bytes")


def main() -> None:
    """Reads the arguments and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--idx", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the IDX files")
    parser.add_argument("--sample", type=int, nargs="?", const=1000, help="only the first pictures of the test split")
    options = parser.parse_args()
    for split, prefix in FILES.items():
        if options.sample and split != "test":
            continue
        images = read_idx(options.idx / f"{prefix}-images-idx3-ubyte.gz")[: options.sample]
        labels = read_idx(options.idx / f"{prefix}-labels-idx1-ubyte.gz")[: options.sample]
        write(options.out / f"{split}-00000-of-00001.parquet", images, labels)


if __name__ == "__main__":
    main()
