"""Certifies the user's own image files, without labels, and writes their run folder."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import torch
import yaml
from torch import Tensor

from certipatch.certificate import Certificate
from certipatch.data import load, read_picture
from certipatch.defenses import Defense, Evidence
from certipatch.errors import InputError
from certipatch.plumbing import files
from certipatch.plumbing.versions import versions
from certipatch.runs import run
from certipatch.saved import Card, ClassifierInfo, DefenseRef, open_defense
from certipatch.saved.open import check_shape, open_certified
from certipatch.threats import Threat

MAX_NAMED = 20  # unreadable images that are named together


@final
@dataclass(frozen=True)
class CertifiedBatch:
    """Some image files and their certificates."""

    defense: Defense
    card: Card | ClassifierInfo
    paths: list[Path]
    images: Tensor
    """(B, C, H, W) in [0, 1]."""
    certificate: Certificate
    largest: list[int | None]
    """Side of the largest certified square of each image, or None if the defense does not know it."""
    evidence: Evidence


class Report(Protocol):
    """A page that receives every batch; at the end of the run it makes its text from the settings and the summary."""

    def add(self, batch: CertifiedBatch) -> None: ...

    def page(self, config: dict[str, Any], summary: dict[str, Any]) -> str: ...


def certify_files(
    paths: list[Path], ref: DefenseRef, threat: Threat, out: Path | None = None, report: Report | None = None
) -> dict[str, Any]:
    """Certify image files; gives the object of ``certify --json``. With ``out`` also a run folder, with the report."""
    defense, card, name = open_certified(ref, threat, lambda: (read_all_or_raise(paths, read_size), None))
    if "all_margins" not in (ref.settings or {}):
        defense.compute_all_margins()
    if out is not None and out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty; give a new --out")
    images = torch.stack(read_all_or_raise(paths, lambda path: read_image(path, card)))
    defense.select_backend(images[:1], len(images))
    results = certify_images(defense, card, images, paths, threat, report)
    sampled = {"confidence": defense.confidence} if defense.confidence < 1 else {}
    notion = {"notion": defense.notion} if defense.notion != "recovery" else {}
    answer = {"defense": name, "threat": threat.to_dict(), **notion, **sampled, "results": results}
    if out is not None:
        config, summary = certify_config_and_summary(defense, card, name, ref.network, paths, threat, results)
        out.mkdir(parents=True, exist_ok=True)
        files.write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        files.write_json(out / "results.json", answer)
        files.write_json(out / "summary.json", summary)
        if report is not None:
            files.write_text(out / "report.html", report.page(config, summary))
    return answer


def certify_images(
    defense: Defense,
    card: Card | ClassifierInfo,
    images: Tensor,
    paths: list[Path],
    threat: Threat,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Results of image files, as in ``certify --json``; the report sees every batch."""
    results: list[dict[str, Any]] = []
    for part in images.split(run.PART):
        certificate, largest, evidence = certify_batch(defense, part, threat)
        names = paths[len(results) : len(results) + len(part)]
        results += [result_of(str(path), certificate, i, card.classes, largest[i]) for i, path in enumerate(names)]
        if report is not None:
            report.add(CertifiedBatch(defense, card, names, part, certificate, largest, evidence))
    return results


def certify_config_and_summary(
    defense: Defense,
    card: Card | ClassifierInfo,
    name: str,
    opened: str,
    paths: list[Path],
    threat: Threat,
    results: list[dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and summary of a run of certify."""
    config = {
        "command": "certify",
        "defense": name,
        "method": defense.name,
        "settings": defense.settings(),
        "model_sha256": card.sha256,
        "image_size": list(card.image_size),
        "pictures": [{"file": str(p), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths],
        "threat": threat.to_dict(),
        "model": opened,
        "versions": versions(),
    }
    summary = {key: config[key] for key in ("defense", "model_sha256", "threat", "versions")}
    summary |= {
        "images": len(paths),
        "certified": sum(result["certified"] for result in results),
        "notion": defense.notion,
        "theorem": defense.theorem,
        "confidence": defense.confidence,
        "seed": card.seed,
    }
    return config, summary


def read_all_or_raise(paths: list[Path], read: Callable[[Path], Any]) -> list[Any]:
    """Read every file. InputError that names all files that cannot be read, not the first alone."""
    contents, wrong = [], []
    for path in paths:
        try:
            contents.append(read(path))
        except InputError as error:
            wrong.append(str(error))
    if len(wrong) > 1:
        more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise InputError(f"{len(wrong)} of {len(paths)} pictures cannot be used: {'; '.join(wrong[:MAX_NAMED])}{more}")
    if wrong:
        raise InputError(wrong[0])
    return contents


def read_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image file."""
    _, height, width = read_picture(path).shape
    return height, width


def read_image(path: Path, card: Card | ClassifierInfo) -> Tensor:
    """An image file (C, H, W) as the card's network reads it. InputError if it does not fit."""
    image = read_picture(path, card.image_size if card.resize else None, card.channels)
    check_shape((*image.shape[1:], image.shape[0]), card, str(path))
    return image


def certify_sample(defense_name: str, data: str, threat: Threat, indices: Iterable[int]) -> list[str]:
    """One line about each of some images of a dataset."""
    defense, card = open_defense(defense_name)
    pictures = load(data)
    certificate, largest, _ = certify_batch(defense, pictures.images(list(indices)), threat)
    lines = []
    for i, index in enumerate(indices):
        true, answer = card.classes[int(pictures.labels[index])], card.classes[int(certificate.label[i])]
        state = "certified" if certificate.certified[i] else "not certified"
        lines.append(f"picture {index} ({true}): {answer}, {state}, largest certified square {largest[i]}x{largest[i]}")
    return lines


def certify_batch(defense: Defense, images: Tensor, threat: Threat) -> tuple[Certificate, list[int | None], Evidence]:
    """Certificates, largest certified squares, and the evidence that both come from."""
    evidence = defense.evidence(images)
    largest = defense.largest_patch(evidence)
    sides: list[int | None] = [None] * len(images) if largest is None else largest.tolist()
    return defense.certificate(evidence, threat), sides, evidence


def result_of(
    name: str, certificate: Certificate, i: int, classes: tuple[str, ...], largest: int | None
) -> dict[str, Any]:
    """One entry of ``certify --json``."""
    location, label = int(certificate.weakest[i]), int(certificate.label[i])
    margin = certificate.margin[i, location].item()
    box = certificate.box(location)
    raised = {} if certificate.alarm is None else {"alarm": bool(certificate.alarm[i])}
    return {
        "image": name,
        "label": label,
        "name": classes[label],
        "certified": bool(certificate.certified[i]),
        **raised,
        "margin": margin if math.isfinite(margin) else None,
        "largest_patch": largest,
        "weakest": None if box is None else dict(zip(("top", "left", "height", "width"), box, strict=True)),
    }
