"""certipatch.data: what goes in comes out pixel for pixel, and all that is wrong is one InputError that says so."""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from certipatch.data import Pictures, dataset_names, decode, decoding, load, parquet, pictures, read_picture
from certipatch.errors import InputError

RNG = np.random.default_rng(0)
GREY = [RNG.integers(0, 256, (6, 5), dtype=np.uint8) for _ in range(12)]
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
SHARED = Path(os.environ.get("CERTIPATCH_DATA") or Path(__file__).parents[2] / "shared" / "data")


def encode(pixels, kind="PNG", **options):
    out = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, kind, **options)
    return out.getvalue()


def write_parquet(path, encoded, labels, *, image="image", label="label", label_type=None, metadata=None):
    label_type = label_type or pa.int64()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({image: kind, label: label_type}, metadata=metadata)
    rows = [None if item is None else {"bytes": item, "path": "x.png"} for item in encoded]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: rows, label: labels}, schema=schema), path, row_group_size=5)
    return path.parent


def write_classes(root, classes=("cat", "ant"), per_class=6):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            (root / name / f"{i}.png").write_bytes(encode(GREY[(k * per_class + i) % 12]))
    return root


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "things"
    write_parquet(root / "train-00000-of-00001.parquet", [encode(p) for p in GREY[:3]], [0, 1, 2])
    return write_parquet(root / "test-00000-of-00001.parquet", [encode(p) for p in GREY], list(range(4)) * 3)


def fails(match, call, *arguments, **options):
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


# ---- decoding


def test_pixels_are_the_source():
    assert np.array_equal(decode(encode(GREY[0]), "a")[:, :, 0], GREY[0])
    assert np.array_equal(decode(encode(COLOUR), "a"), COLOUR)
    for kind in ("BMP", "TIFF", "PPM"):
        assert np.array_equal(decode(encode(COLOUR, kind), "a"), COLOUR)
    assert np.array_equal(decode(encode(COLOUR, "WEBP", lossless=True), "a"), COLOUR)


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 257, 128], [129, 65535, 32768]], np.uint16)
    expected = [[0, 1, 0], [1, 255, 128]]
    assert decode(encode(values), "a")[:, :, 0].tolist() == expected
    assert decode(encode(values, "TIFF"), "a")[:, :, 0].tolist() == expected
    assert decode(encode(values.astype(np.int32), "TIFF"), "a")[:, :, 0].tolist() == expected


def test_modes():
    colour = Image.fromarray(COLOUR)
    assert decode(encode(Image.fromarray(GREY[0] > 99)), "a").shape == (6, 5, 1)
    assert set(np.unique(decode(encode(Image.fromarray(GREY[0] > 99)), "a"))) <= {0, 255}
    assert decode(encode(colour.convert("P")), "a").shape == (6, 5, 3)
    assert decode(encode(colour.convert("CMYK"), "JPEG"), "a").shape == (6, 5, 3)
    assert decode(encode(colour, "GIF"), "a").shape == (6, 5, 3)
    assert np.array_equal(decode(encode(colour.convert("RGBA")), "a"), COLOUR)
    assert decode(encode(Image.fromarray(GREY[0]).convert("LA")), "a").shape == (6, 5, 1)


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(decode(encode(COLOUR, exif=exif), "a"), np.rot90(COLOUR, -1))


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (10, 200)]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(encoded, "a") == 10).all()


def test_size_crops_the_middle():
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    assert (decode(encode(wide), "a", (4, 4)) == 200).all()
    assert decode(encode(COLOUR), "a", (8, 3)).shape == (8, 3, 3)


@pytest.mark.parametrize("size", [(0, 4), (4,), 4, (4, 9000), (2.5, 2), "ab"])
def test_bad_size(size):
    fails("size", decode, encode(GREY[0]), "a", size)


def test_bad_pictures():
    clear = Image.fromarray(COLOUR).convert("RGBA")
    clear.putpixel((1, 1), (0, 0, 0, 100))
    big = encode(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    fails("'a.png' is empty", decode, b"", "a.png")
    fails("'a.png' is no picture", decode, b"hello", "a.png")
    fails("'a.png' is no picture", decode, encode(COLOUR, "ICO"), "a.png")
    fails("'a.png' has transparency; flatten", decode, encode(clear), "a.png")
    fails("'a.png' has transparency; flatten", decode, encode(clear, "GIF", transparency=0), "a.png")
    fails("type F", decode, encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "a.png")
    fails("type I", decode, encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "a.png")
    for encoded in (big[: len(big) // 2], encode(GREY[0])[:-20], encode(GREY[0])[:40]):
        fails("'a.png' is (a damaged|no picture)", decode, encoded, "a.png")
    flipped = bytearray(encode(GREY[0]))
    flipped[45] ^= 255
    fails("'a.png' is a damaged", decode, bytes(flipped), "a.png")


def test_garbage_never_leaks_another_error():
    sources = [encode(COLOUR, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
    for i in range(300):
        damaged = bytearray(sources[i % len(sources)])
        for place in RNG.integers(0, len(damaged), 4):
            damaged[place] = RNG.integers(256)
        with contextlib.suppress(InputError):
            assert decode(bytes(damaged), "a").dtype == np.uint8


def test_too_many_pixels_without_a_warning():
    encoded = bytearray(encode(np.zeros((10_000, 10_000), bool)))  # 100 megapixels in a few KB
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fails("'a' has more than 67,108,864 pixels", decode, bytes(encoded), "a")


def test_read_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encode(COLOUR))
    image = read_picture(path)
    assert image.dtype == torch.float32
    assert image.shape == (3, 6, 5)
    assert torch.equal(image, torch.from_numpy(COLOUR).permute(2, 0, 1) / 255)
    assert read_picture(str(path), (4, 4)).shape == (3, 4, 4)
    fails("no file", read_picture, tmp_path / "b.png")
    fails("is a folder", read_picture, tmp_path)
    fails("cannot read", read_picture, "a\0b")
    fails("not a regular file", read_picture, "/dev/zero")
    monkeypatch.setattr(decoding, "MAX_FILE", 10)
    fails("larger than", read_picture, path)


# ---- parquet folders


def test_parquet(folder):
    data = load(str(folder))
    assert isinstance(data, Pictures)
    assert (data.name, data.split, data.source, data.note) == ("things", "test", str(folder), None)
    assert data.class_names == ("0", "1", "2", "3")
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 1, 2, 3] * 3
    assert len(data) == 12
    images = data.images([3, 7])
    assert images.dtype == torch.float32
    assert torch.equal(images[1, 0], torch.from_numpy(GREY[7]) / 255)
    assert np.array_equal(data.pixels(range(12))[:, :, :, 0], np.stack(GREY))
    every = data.decode_all(threads=2)
    assert every.dtype == torch.uint8
    assert np.array_equal(every[:, 0].numpy(), np.stack(GREY))
    assert data.encoded(2) == encode(GREY[2])
    assert len(data.sha256(0)) == 64
    assert load(str(folder), size=(8, 9)).images([0]).shape == (1, 1, 8, 9)
    assert str(folder) not in repr(data)


def test_limit_and_fingerprint(folder):
    data, part = load(str(folder)), load(str(folder), limit=7)
    assert len(part) == len(part.store) == 7
    assert part.class_names == data.class_names
    assert np.array_equal(part.pixels([6]), data.pixels([6]))
    assert len(load(str(folder), limit=1000)) == 12
    assert data.fingerprint() == load(str(folder)).fingerprint() != part.fingerprint()


@pytest.mark.parametrize("limit", [0, -1, 2.5, "3"])
def test_bad_limit(folder, limit):
    fails("limit", load, str(folder), limit=limit)


def test_bad_seed(folder):
    fails("seed -1", load, str(folder), seed=-1)


def test_bad_indices(folder):
    data = load(str(folder))
    fails("no picture 12 in things test; give 0 to 11", data.images, [12])
    fails("no picture -1", data.encoded, -1)
    fails("no indices", data.pixels, [])


def test_splits(folder, tmp_path):
    assert load(str(folder), "train").labels.tolist() == [0, 1, 2]
    fails("no split 'val'; give one of test, train", load, str(folder), "val")
    for split in ("../x", "test[:10]", "", "a/b"):
        fails("plain name", load, str(folder), split)
    (folder / "test-00000-of-00001.parquet").rename(folder / "validation-00000-of-00001.parquet")
    assert load(str(folder)).split == "validation"
    (folder / "validation-00000-of-00001.parquet").rename(folder / "extra-00000-of-00001.parquet")
    fails("several splits; give one of extra, train", load, str(folder))
    (folder / "train-00000-of-00001.parquet").unlink()
    assert load(str(folder)).split == "extra"


def test_shards(tmp_path):
    root = tmp_path / "d"
    for i in range(2):
        write_parquet(root / f"test-0000{i}-of-00002.parquet", [encode(p) for p in GREY[i * 3 : i * 3 + 3]], [i] * 3)
    data = load(str(root), limit=5)
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(data.pixels([4])[0, :, :, 0], GREY[4])
    (root / "test-00001-of-00002.parquet").unlink()
    fails("1 of 00002 parquet files for 'test'", load, str(root))


def test_other_columns_and_class_names(tmp_path):
    features = {"fine_label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    one = write_parquet(
        tmp_path / "a" / "test-0.parquet",
        [encode(GREY[0])],
        [1],
        image="img",
        label="fine_label",
        label_type=pa.uint8(),
        metadata=metadata,
    )
    assert load(str(one)).class_names == ("x", "y")
    bad = write_parquet(tmp_path / "b" / "test-0.parquet", [encode(GREY[0])], [2], metadata={"huggingface": "{"})
    assert load(str(bad)).class_names == ("0", "1", "2")


def test_known_folder_names_and_note(tmp_path, monkeypatch):
    write_parquet(tmp_path / "cifar10" / "test-0.parquet", [encode(COLOUR, "JPEG")], [3], image="img")
    data = load(str(tmp_path / "cifar10"))
    assert data.class_names[data.labels[0]] == "cat"
    assert data.note == "JPEG-recompressed copy"
    monkeypatch.setenv("CERTIPATCH_DATA", str(tmp_path))
    data = load("cifar10")
    assert (data.name, data.source, data.split) == ("cifar10", "cifar10", "test")
    write_parquet(tmp_path / "mnist" / "test-0.parquet", [encode(GREY[0])], [3])
    assert load("mnist").note is None


def test_bad_parquet(tmp_path, monkeypatch):
    png = encode(GREY[0])

    def make(name, *arguments, **options):
        return str(write_parquet(tmp_path / name / "test-0.parquet", *arguments, **options))

    fails("none called image or img", load, make("a", [png], [0], image="photo"))
    fails("none called label or", load, make("b", [png], [0], label="target"))
    fails("whole numbers", load, make("c", [png], [0.5], label_type=pa.float64()))
    fails("label -1", load, make("d", [png, png], [0, -1]))
    fails("label 10000000000", load, make("e", [png], [10**10]))
    fails("without a label", load, make("f", [png, png], [0, None]))
    fails("without the picture's bytes", load, make("g", [png, None], [0, 1]))
    fails("no rows", load, make("h", [], []))
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), Path(make("i", [png], [0])) / "test-0.parquet")
    fails("not a struct", load, str(tmp_path / "i"))
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "test-0.parquet").write_bytes(b"PAR1 not really PAR1")
    fails("cannot read the 'test' parquet", load, str(tmp_path / "j"))
    whole = (Path(make("k", [png] * 20, [0] * 20)) / "test-0.parquet").read_bytes()
    (tmp_path / "k" / "test-0.parquet").write_bytes(whole[:30] + b"\xff" * 60 + whole[90:])
    fails("cannot read|no picture|damaged", lambda: load(str(tmp_path / "k")).pixels(range(20)))
    fails("k test picture 1' is no picture", load(make("k", [png, b"junk"], [0, 1])).images, [0, 1])
    good = make("l", [png] * 3, [0] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "MAX_ENCODED", 100)
        fails("give a limit", load, good)
    monkeypatch.setattr(parquet, "MAX_ROWS", 2)
    fails("more than 2 rows", load, good)


def test_mixed_shapes(tmp_path):
    encoded = [encode(GREY[0]), encode(GREY[0][:5]), encode(COLOUR)]
    data = load(str(write_parquet(tmp_path / "m" / "test-0.parquet", encoded, [0, 0, 0])))
    fails(r"picture 0' \(6x5\) and 'm test picture 1' \(5x5.*give a size", data.images, [0, 1])
    mixed = load(str(tmp_path / "m"), size=(6, 5))
    assert torch.equal(mixed.images([2, 0])[1], data.images([0])[0].expand(3, -1, -1)), "grey becomes colour"
    assert torch.equal(mixed.decode_all(), torch.from_numpy(mixed.pixels([0, 1, 2])).permute(0, 3, 1, 2))
    assert torch.equal(load(str(tmp_path / "m"), size=(6, 5), channels=3).images([0])[0], mixed.images([2, 0])[1])
    fails("RGB, but grey", load(str(tmp_path / "m"), size=(6, 5), channels=1).images, [0, 2])
    fails("give a size", data.decode_all)


def test_decode_all_budget(folder, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_DECODED", 100)
    fails("12 pictures of 6x5x1 need .* smaller size or a limit", load(str(folder)).decode_all)


# ---- class folders


def test_class_folders(tmp_path):
    root = write_classes(tmp_path / "pets")
    (root / "notes.txt").write_text("x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / ".hidden.png").write_text("x")
    (root / ".cache").mkdir()
    data = load(str(root))
    assert (data.name, data.split, data.class_names) == ("pets", "all", ("ant", "cat"))
    assert len(data) == 12
    for i, label in enumerate(data.labels):  # write_classes gave cat the first six
        k = next(k for k in range(12) if np.array_equal(GREY[k], data.pixels([i])[0, :, :, 0]))
        assert (k < 6) == (data.class_names[label] == "cat")
    assert data.fingerprint() == load(str(root)).fingerprint()
    assert data.fingerprint() != load(str(root), seed=1).fingerprint()
    assert sorted(data.sha256(i) for i in range(12)) == sorted(load(str(root), seed=1).sha256(i) for i in range(12))
    assert len(set(load(str(root), limit=8).labels.tolist())) == 2
    assert load(str(root), limit=8).labels.tolist() == data.labels[:8].tolist()


def test_class_folders_with_splits(tmp_path):
    write_classes(tmp_path / "p" / "train", ("a", "b", "c"), 2)
    write_classes(tmp_path / "p" / "test", ("a", "c"), 2)
    data = load(str(tmp_path / "p"))
    assert data.split == "test"
    assert data.class_names == ("a", "b", "c")
    assert set(data.labels.tolist()) == {0, 2}
    assert len(load(str(tmp_path / "p"), "train")) == 6
    fails("give one of test, train", load, str(tmp_path / "p"), "all")


def test_bad_class_folders(tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    fails("neither SPLIT-.* nor class folders", load, str(tmp_path / "empty"))
    write_classes(tmp_path / "split" / "train", ("cat", "dog"), 1)
    (tmp_path / "split" / "train" / "thumb.png").write_bytes(b"")
    fails("train' holds pictures .thumb.png, ….* beside folders of pictures", load, str(tmp_path / "split"))
    root = write_classes(tmp_path / "pets", ("cat",), 1)
    (root / "cat" / "0.png").write_text("no picture")
    fails("cat/0.png' is no picture", load(str(root)).images, [0])
    data = load(str(root))
    (root / "cat" / "0.png").unlink()
    fails("no file", data.fingerprint)


# ---- names and the Hub


def test_sample():
    data = load("fashion-sample")
    assert (data.name, data.split, data.source, len(data)) == ("fashion-sample", "test", "fashion-sample", 1000)
    assert data.class_names[9] == "Ankle boot"
    assert data.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # as Fashion-MNIST's test split begins
    assert data.images(range(10)).shape == (10, 1, 28, 28)
    assert data.note is None
    assert next(iter(dataset_names())) == "fashion-sample"
    assert {"mnist", "cifar10", "imagenette", "fashion-mnist"} < set(dataset_names())
    fails("^'fashion-sample' has no split 'train'", load, "fashion-sample", "train")


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.bin").write_text("x")
    fails("did you mean 'mnist'", load, "mnsit")
    fails("did you mean 'cifar10'", load, "CIFAR-10")
    fails("known are fashion-sample, mnist", load, "zzz")
    fails("no dataset or folder ''", load, "")
    fails("no folder './x'", load, "./x")
    fails("no folder '/a/b/c'", load, "/a/b/c")
    fails("is a file", load, "file.bin")
    fails("no dataset", load, "a\0b")
    fails("no dataset", load, "a" * 5000)


@pytest.mark.slow
def test_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"image": [{"bytes": encode(p), "path": None} for p in GREY[:4]], "label": [0, 1, 1, 0]}
    made = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: asked.append(arguments) or made)
    monkeypatch.delenv("CERTIPATCH_DATA", raising=False)
    data = load("owner/thing", limit=3)
    assert (data.name, data.source, data.split) == ("owner/thing", "owner/thing", "test")
    assert data.class_names == ("no", "yes")
    assert data.labels.tolist() == [0, 1, 1]
    assert np.array_equal(data.pixels([2])[0, :, :, 0], GREY[2])
    data = load("mnist")
    assert (data.name, data.source, data.class_names) == ("mnist", "ylecun/mnist", tuple("0123456789"))
    assert load("ylecun/mnist").name == "mnist"
    load("imagenette")
    assert asked == [
        ("owner/thing", None),
        ("ylecun/mnist", None),
        ("ylecun/mnist", None),
        ("frgfm/imagenette", "320px"),
    ]
    fails("'ylecun/mnist' has no split 'val'; give one of test", load, "mnist", "val")

    def offline(*arguments):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    fails("'ylecun/mnist' from the Hub .no network at all.; .*CERTIPATCH_DATA", load, "mnist")


def test_import_is_light():
    code = "import sys, certipatch.data; sys.exit(any(m in sys.modules for m in ('torch', 'datasets')))"
    path = os.pathsep.join(filter(None, [str(Path(decoding.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}).returncode == 0


# ---- real data, where it is


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    ("name", "split", "count", "shape"),
    [
        ("mnist", "test", 10_000, (1, 28, 28)),
        ("cifar10", "test", 10_000, (3, 32, 32)),
        ("imagenette", "validation", None, (3, 64, 64)),
    ],
)
def test_real_data(name, split, count, shape):
    data = load(str(SHARED / name), size=shape[1:])
    assert data.split == split
    assert count is None or len(data) == count
    assert data.images(range(8)).shape == (8, *shape)
    assert len(data.class_names) == 10


def test_classes_of_the_same_names_are_numbered_alike(tmp_path):
    write_classes(tmp_path / "pets" / "test", ("cat", "Dog", "owl"), per_class=2)
    pictures = load(str(tmp_path / "pets"), "test")
    assert pictures.class_names == ("Dog", "cat", "owl")
    turned = pictures.in_order_of(("owl", "dog", "cat"))
    assert [turned.class_names[label] for label in turned.labels] == [
        pictures.class_names[label].casefold() for label in pictures.labels
    ]
    for other in (("dog", "cat", "owl"), ("a", "b", "c"), ("cat", "cat", "dog"), ("cat", "dog")):
        assert pictures.in_order_of(other) is pictures


def test_val_is_a_validation_split(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / "pets" / split)
    assert load(str(tmp_path / "pets")).split == "val"
