"""Records of an attack: one row per image, the attacked pixels as evidence, and the patches that broke a certificate."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from certipatch.attacks import Outcome
from certipatch.certificate import Certificate
from certipatch.errors import InputError
from certipatch.plumbing.files import write_bytes
from certipatch.runs.records import MAX_SCORES
from certipatch.threats import PatchThreat, SparseThreat

if TYPE_CHECKING:
    from certipatch.runs.attack import AttackJob


def attack_rows(
    job: "AttackJob",
    indices: range,
    images: Tensor,
    label: Tensor,
    alarm: Tensor,
    certificate: Certificate | None,
    chosen: list[int],
    outcome: Outcome | None,
) -> list[dict[str, Any]]:
    """Records and evidence of a part, one dictionary per image."""
    position = {i: at for at, i in enumerate(chosen)}
    sparse = isinstance(job.threat, SparseThreat)  # one location: the whole image
    single = isinstance(job.threat, PatchThreat) and job.threat.count == 1
    locations = job.threat.locations(job.image_size) if isinstance(job.threat, PatchThreat) else None
    rows = []
    for i, index in enumerate(indices):
        margins = None if certificate is None else certificate.margin[i].cpu()
        row: dict[str, Any] = {
            "index": index,
            "sha256": job.pictures.sha256(index),
            "target": int(job.pictures.labels[index]),
            "label": int(label[i]),
            "alarm": bool(alarm[i]),
            "certified": margins is not None and bool((margins > 0).all()),
            "margin": None if margins is None else margins.amin().item(),
            "attacked": i in position,
            "broken": False,
            "attacked_label": int(label[i]),
            "attacked_alarm": bool(alarm[i]),
            "loss": None,
            **dict.fromkeys(("top", "left", "height", "width")),
            **dict.fromkeys(("places", "certified_places", "violated"), 0),
            **dict.fromkeys(("pixels", "values", "tried")),
        }
        if outcome is not None and i in position:
            at = position[i]
            attacked_whole = len(outcome.tried[at]) > 0
            tried = sorted(place for place in outcome.tried[at] if place >= 0)
            pixels, values = changed_pixels(images[i], outcome.attacked[at].cpu())
            certified_places = 0
            if margins is not None:
                certified_places = int((margins[tried] > 0).sum()) if single else len(tried) * int(row["certified"])
            row |= {
                "broken": bool(outcome.broken[at]),
                "attacked_label": int(outcome.label[at]),
                "attacked_alarm": bool(outcome.alarm[at]),
                "loss": float(outcome.loss[at]),
                "places": int(attacked_whole) if sparse else len(tried),
                "certified_places": int(attacked_whole and row["certified"]) if sparse else certified_places,
                "violated": len(outcome.violated[at]),
                "pixels": pixels,
                "values": values,
                "tried": np.array(tried, "<i4").tobytes(),
            }
            place = int(outcome.choice[at, 0])
            if locations is not None and place >= 0:
                row |= dict(zip(("top", "left", "height", "width"), locations.box(place), strict=True))
        rows.append(row)
    return rows


def changed_pixels(image: Tensor, attacked: Tensor) -> tuple[bytes | None, bytes | None]:
    """Numbers and values of the pixels that differ; None if there are too many to be stored."""
    pixels = (image != attacked).any(0).flatten().nonzero().flatten()
    if len(pixels) * len(image) > MAX_SCORES:
        return None, None
    values = attacked.flatten(1)[:, pixels].float().numpy().astype("<f4")
    return pixels.numpy().astype("<i4").tobytes(), values.tobytes()


def attacked_picture(image: np.ndarray, row: dict[str, Any]) -> np.ndarray | None:
    """The attacked image as uint8 (H, W, C), from the image and a row of the evidence; None if it was not stored."""
    if row["pixels"] is None or row["values"] is None:
        return None
    pixels = np.frombuffer(row["pixels"], "<i4")
    values = np.frombuffer(row["values"], "<f4").reshape(image.shape[2], -1)
    result = image.copy().reshape(-1, image.shape[2])
    if len(pixels) and not (pixels.min() >= 0 and pixels.max() < len(result) and values.shape[1] == len(pixels)):
        raise InputError("attacked pixels lie outside of the picture; run attack again")
    result[pixels] = np.clip(np.nan_to_num(values.T * 255), 0, 255).round().astype(np.uint8)
    return result.reshape(image.shape)


def save_break(out: Path, index: int, image: Tensor, attacked: Tensor, row: dict[str, Any]) -> None:
    """Write the image and the attacked image, as PNG for the eye and exactly for an analysis."""
    folder = out / "broken"
    folder.mkdir(exist_ok=True)
    meta = {
        key: str(row[key]) for key in ("index", "label", "attacked_label", "margin", "top", "left", "height", "width")
    }
    write_bytes(folder / f"{index:08d}.safetensors", save({"picture": image, "attacked": attacked.contiguous()}, meta))
    for name, pixels in (("picture", image), ("attacked", attacked)):
        shown = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)
        file = io.BytesIO()
        picture.save(file, "PNG")
        write_bytes(folder / f"{index:08d}-{name}.png", file.getvalue())
