"""A defense as one ONNX file: views, network and rule in one graph, images in, labels out."""

import copy
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses import Defense
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.double_masking import merge_sizes
from certipatch.defenses.patchcleanser import PatchCleanser
from certipatch.errors import InputError
from certipatch.export.network import logits
from certipatch.models import Cascade, SharedViT
from certipatch.models.adapters.onnx import OnnxNetwork
from certipatch.models.quickest import as_program
from certipatch.plumbing.versions import versions
from certipatch.rules import DoubleMask
from certipatch.saved import Card
from certipatch.saved.open import ClassifierInfo
from certipatch.threats import PatchThreat
from certipatch.views import PixelSets

__all__ = ["AsGraph", "to_onnx"]

MAX_PIXELS = 2**23  # of all views of one image: 8,192 views of 32x32, 167 of 224x224
PROBES = 4  # random images on which the written file must predict as the defense does
INSTALL = "pip install 'certipatch[onnx]'"


class AsGraph(nn.Module):
    """A defense for images of one size, as a graph: images (B, C, H, W) float32 in [0, 1] → its outputs.

    The first output is the label (B,), int64; a defense that detects has an alarm (B,), bool, as the second. Views are
    constants. Nothing stops early: double masking evaluates every pair of masks.

    Errors: InputError if the defense cannot be one graph.
    """

    def __init__(self, defense: Defense, image_size: tuple[int, int], channels: int):
        super().__init__()
        self.defense_name = defense.name
        network = defense.exported_network(image_size)
        if network is None:
            reason = "its answers rest on random draws" if defense.takes_random_views else "its answers have no graph"
            raise InputError(f"{defense.name} cannot be exported: {reason}")
        self.model = network
        if not isinstance(defense, ViewDefense):
            self.answer = lambda images: (self.model(images).argmax(1),)
            return
        views = defense.views_of(image_size)
        number = views.number(image_size)
        if getattr(defense.model, "encoding", "null") != "all-views" and number * math.prod(image_size) > MAX_PIXELS:
            raise InputError(
                f"{defense.name} looks at {number} views of {image_size[0]}x{image_size[1]} pixels; a graph, which cannot stop "
                f"early, would hold all of them in memory. Use fewer views (of masks: --set masks=3)"
            )
        probe = torch.zeros(1, channels, *image_size)
        defense.check(probe)
        tolerance = defense.tolerance(probe)
        self.unmasked = None
        if isinstance(defense, PatchCleanser) and defense.fallback == "unmasked":
            self.unmasked = defense.unmasked
        if any(isinstance(module, SharedViT | Cascade) for module in self.modules()):
            self.model, self.unmasked = copy.deepcopy((self.model, self.unmasked))
            for module in self.modules():
                if isinstance(module, SharedViT):  # the skipped parts depend on the image, the outputs do not
                    module.skip_hidden = False
                elif isinstance(module, Cascade):
                    module.early_exit = False
        larger, unmasked = [], None
        if isinstance(defense, PatchCleanser):
            larger = [(logits(self.model, s.pairs, image_size, channels), s) for s in defense.larger(image_size)]
            if self.unmasked is not None:
                every = PixelSets(torch.ones(1, *image_size, dtype=torch.bool))
                unmasked, views = logits(self.unmasked, every, image_size, channels), defense.sizes(image_size)[-1]
        scores = logits(self.model, views, image_size, channels)
        with torch.inference_mode():
            classes = scores(probe).shape[2]
        rule = defense.rule(image_size)
        answer_of = rule.graph(number, classes)

        def answer(images: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
            view_scores = scores(images)
            if isinstance(rule, DoubleMask):  # the rule ignores errors
                table = merge_sizes(ev.scores(view_scores), [(ev.scores(of(images)), masks) for of, masks in larger])
                if unmasked is not None:
                    table = torch.cat([table, ev.scores(unmasked(images))], 1)
                return answer_of(table, None)
            values, _, error = defense.values(view_scores, tolerance)
            return answer_of(values, error)

        self.answer = answer

    def forward(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        return self.answer(images)


def to_onnx(defense: Defense, card: Card | ClassifierInfo, path: Path) -> dict[str, Any]:
    """Write ``path``; gives ``{inputs, outputs, bytes, checked}``; ``checked`` counts images on which onnxruntime agrees.

    The file is for images of the card's size and any number of them; its metadata name the defense, its settings, its
    classes and the digest of its weights.

    Errors: InputError if a package is missing, the defense has no graph, or onnxruntime answers otherwise.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"export needs {' and '.join(missing)}: {INSTALL}")
    module = AsGraph(defense, card.image_size, card.channels).eval()
    if any(isinstance(part, OnnxNetwork) for part in module.modules()):
        raise InputError(
            "the classifier is an ONNX file, a black box that no other file can hold; give it as an nn.Module"
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(PROBES, card.channels, *card.image_size, generator=generator)
    with torch.no_grad():
        names = ("label", "alarm")[: len(module(images[:1]))]
    program = _program(module, images[:2], names)
    program.model.metadata_props.update(_metadata(defense, card))
    temporary = path.with_name(path.name + ".part")
    try:
        program.save(str(temporary), external_data=False)
        checked = _agrees(temporary, defense, images) if find_spec("onnxruntime") is not None else 0
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    shape = ["batch", card.channels, *card.image_size]
    return {"inputs": {"images": shape}, "outputs": names, "bytes": path.stat().st_size, "checked": checked}


def _program(module: nn.Module, images: Tensor, names: tuple[str, ...]) -> Any:
    try:
        return as_program(module, images, names)
    except torch.onnx.OnnxExporterError as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__ or error)).strip().splitlines()[0][:200]
        raise InputError(f"the network has operations that ONNX cannot hold: {reason}") from None


def _metadata(defense: Defense, card: Card | ClassifierInfo) -> dict[str, str]:
    values = {
        "defense": defense.name,
        "settings": defense.settings(),
        "model": card.name,
        "model_sha256": card.sha256,
        "classes": card.classes,
        "theorem": defense.theorem,
        "versions": versions(),
    }
    return {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in values.items()}


def _agrees(path: Path, defense: Defense, images: Tensor) -> int:
    """Compare onnxruntime's labels and alarms with the defense's; gives the number of images. InputError if one differs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if defense.notion == "detection":
        cert = defense.certify(images, PatchThreat(1))  # its alarm is the same for every threat
        expected = [cert.label, cert.alarm]
    else:
        expected = [defense.predict(images)]
    try:
        answers = session.run(None, {"images": images.numpy()})
    except Exception as error:  # onnxruntime's own errors share no type
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"the network as ONNX does not run on {len(images)} pictures: {reason}; not written") from None
    for answer, own in zip(answers, expected, strict=True):
        computed = torch.from_numpy(answer)
        if not torch.equal(computed, own):
            raise InputError(f"onnxruntime gives {computed.tolist()}, but the defense {own.tolist()}; not written")
    return len(images)
