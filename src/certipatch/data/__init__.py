"""Images and their labels: known datasets, folders of parquet files, class folders, single image files."""

from certipatch.data.decoding import decode, read_picture
from certipatch.data.known import dataset_names
from certipatch.data.loading import load
from certipatch.data.pictures import Pictures

__all__ = ["Pictures", "dataset_names", "decode", "load", "read_picture"]
