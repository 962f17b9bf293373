"""What the commands do, once their options are read. Imports torch."""

import hashlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from certipatch import report
from certipatch.certificate import Certificate
from certipatch.data import Pictures, load, read_picture
from certipatch.defenses import Defense, Evidence, PatchCleanser, PatchCURE
from certipatch.errors import InputError
from certipatch.evaluation import run
from certipatch.evaluation.claim import sweep
from certipatch.evaluation.evaluate import Job, evaluate
from certipatch.plumbing import devices, distributed, files
from certipatch.plumbing.distributed import Workers
from certipatch.plumbing.versions import versions
from certipatch.saved import Card, open_defense
from certipatch.saved.open import ClassifierInfo, DefenseRef, check_shape, open_certified
from certipatch.threats import Threat

LOOKED_AT = 16  # pictures of a dataset whose sizes are compared before a classifier reads it
MAX_SHOWN = 400  # pictures in the report of certify
MAX_NAMED = 20  # unreadable pictures that are named together


def evaluate_into(
    out: Path,
    defense_name: str,
    data: str,
    threat: Threat,
    split: str | None,
    limit: int | None,
    progress: Callable[[int, int, str], None],
    model_name: str | None = None,
    changes: dict[str, Any] | None = None,
    part: int | None = None,
) -> dict[str, Any]:
    """Evaluate into a run folder, with its report; gives the summary. A finished run is left as it is.

    Under torchrun this process is one of several workers; all but the first give an empty dictionary.
    """
    device, crew = devices.worker()
    defense, card, name = open_certified(
        DefenseRef(defense_name, model_name, changes), threat, lambda: seen_in(data, split)
    )
    size = card.image_size if card.resize else None
    pictures = load(data, split, size=size, channels=card.channels, limit=limit)
    pictures = with_classes(pictures, card.classes, name)
    told_of_training(pictures, card, name)
    defense.to(device)
    opened, part = model_name or defense_name, part or run.PART
    check_shape(pictures.pixels([0])[0].shape, card, pictures.name)
    engine = _quicken(defense, pictures, out, device, crew)
    job = Job(
        defense,
        name,
        card.sha256,
        card.image_size,
        card.classes,
        pictures,
        threat,
        card.seed,
        device,
        opened,
        part,
        engine,
    )
    summary = evaluate(job, out, progress, crew)
    if crew.first and not (out / "report.html").exists():
        files.write_text(out / "report.html", report.of_run(job, out, summary))
    if crew.first:
        sweep(out)
    return summary


def _quicken(defense: Defense, pictures: Pictures, out: Path, device: torch.device, crew: Workers) -> str | None:
    """The way in which all workers run the network: the one that the run began with, else the fastest that the first finds.

    All ask, and the first answers, however late the others come; of a finished run nothing is left to be quick about.
    """
    images, each = pictures.images(range(1)).to(device), -(-len(pictures) // crew.count)

    def first() -> str | None:
        begun = files.read_config(out).get("engine") if (out / "config.yaml").exists() else None
        if (out / "summary.json").exists():
            return begun
        return defense.quicken(images, each, begun)

    engine = crew.share(first)
    if not crew.first and engine is not None:
        defense.quicken(images, each, engine)
    return engine


def certify_files(
    paths: list[Path],
    defense_name: str,
    threat: Threat,
    out: Path | None,
    model_name: str | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Certify picture files: what ``certify --json`` prints. With ``out`` also a run folder with a report."""
    looked = lambda: (each(paths, read_size), None)  # noqa: E731
    defense, card, name = open_certified(DefenseRef(defense_name, model_name, changes), threat, looked)
    if isinstance(defense, PatchCleanser | PatchCURE) and "maps" not in (changes or {}):
        defense.maps = True
    if out is not None and out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty; give a new --out")

    def read(path: Path) -> torch.Tensor:
        image = read_picture(path, card.image_size if card.resize else None, card.channels)
        check_shape((*image.shape[1:], image.shape[0]), card, str(path))
        return image

    pictures = torch.stack(each(paths, read))
    defense.quicken(pictures[:1], len(pictures))
    results, shown, places = certify_shown(defense, card, pictures, paths, threat, MAX_SHOWN if out is not None else 0)
    sampled = {"confidence": defense.confidence} if defense.confidence < 1 else {}
    notion = {"notion": defense.notion} if defense.notion != "recovery" else {}
    answer = {"defense": name, "threat": threat.to_dict(), **notion, **sampled, "results": results}
    if out is not None:
        config, summary = own_run(defense, card, name, model_name or defense_name, paths, threat, results)
        out.mkdir(parents=True, exist_ok=True)
        files.write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        files.write_json(out / "results.json", answer)
        files.write_json(out / "summary.json", summary)
        files.write_text(out / "report.html", report.page(config, summary, None, shown, places))
    return answer


def own_run(
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


def each(paths: list[Path], read: Callable[[Path], Any]) -> list[Any]:
    """What is read of each file. InputError that names all that cannot be read, not the first alone."""
    found, wrong = [], []
    for path in paths:
        try:
            found.append(read(path))
        except InputError as error:
            wrong.append(str(error))
    if len(wrong) > 1:
        more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise InputError(f"{len(wrong)} of {len(paths)} pictures cannot be used: {'; '.join(wrong[:MAX_NAMED])}{more}")
    if wrong:
        raise InputError(wrong[0])
    return found


def read_size(path: Path) -> tuple[int, int]:
    """(H, W) of a picture file."""
    _, height, width = read_picture(path).shape
    return height, width


def seen_in(data: str, split: str | None) -> tuple[list[tuple[int, int]], tuple[str, ...] | None]:
    """The sizes of some of a dataset's pictures, the first and the last among them, and the names of its classes."""
    pictures = load(data, split)
    looked_at = sorted({round(i * (len(pictures) - 1) / (LOOKED_AT - 1)) for i in range(LOOKED_AT)})
    return [pictures.pixels([i])[0].shape[:2] for i in looked_at], pictures.class_names


def certify_sample(defense_name: str, data: str, threat: Threat, indices: Iterable[int]) -> list[str]:
    """One line about each of some pictures of a dataset."""
    defense, card = open_defense(defense_name)
    pictures = load(data)
    found, largest, _ = certify_part(defense, pictures.images(list(indices)), threat)
    lines = []
    for i, index in enumerate(indices):
        true, answer = card.classes[int(pictures.labels[index])], card.classes[int(found.label[i])]
        state = "certified" if found.certified[i] else "not certified"
        lines.append(f"picture {index} ({true}): {answer}, {state}, largest certified square {largest[i]}x{largest[i]}")
    return lines


def certify_shown(
    defense: Defense, card: Card | ClassifierInfo, images: torch.Tensor, paths: list[Path], threat: Threat, most: int
) -> tuple[list[dict[str, Any]], list[report.Shown], report.Places | None]:
    """Results of picture files, and up to ``most`` of them for a report, with the places of the threat."""
    results: list[dict[str, Any]] = []
    shown: list[report.Shown] = []
    places = None
    for part in images.split(run.PART):
        found, largest, evidence = certify_part(defense, part, threat)
        names = paths[len(results) : len(results) + len(part)]
        results += [result_of(str(path), found, i, card.classes, largest[i]) for i, path in enumerate(names)]
        if len(shown) < most:
            places = places or report.places(defense, found, card.image_size, card.classes)
            pixels = (part * 255).round().byte().permute(0, 2, 3, 1).numpy()
            titles = [path.name for path in names]
            shown += report.shown_pictures(pixels, titles, found, evidence, places, card.classes, largest, None)
    return results, shown[:most], places


def certify_part(
    defense: Defense, images: torch.Tensor, threat: Threat
) -> tuple[Certificate, list[int | None], Evidence]:
    """Certificates, largest certified squares, and the evidence that both come from."""
    evidence = defense.evidence(images)
    largest = defense.largest_patch(evidence)
    sides: list[int | None] = [None] * len(images) if largest is None else largest.tolist()
    return defense.certificate(evidence, threat), sides, evidence


def result_of(name: str, found: Certificate, i: int, classes: tuple[str, ...], largest: int | None) -> dict[str, Any]:
    """One entry of ``certify --json``."""
    location = int(found.weakest[i])
    margin = found.margin[i, location].item()
    box = found.box(location)
    raised = {} if found.alarm is None else {"alarm": bool(found.alarm[i])}
    return {
        "image": name,
        "label": int(found.label[i]),
        "name": classes[int(found.label[i])],
        "certified": bool(found.certified[i]),
        **raised,
        "margin": margin if math.isfinite(margin) else None,
        "largest_patch": largest,
        "weakest": None if box is None else dict(zip(("top", "left", "height", "width"), box, strict=True)),
    }


def told_of_training(pictures: Pictures, card: Card | ClassifierInfo, name: str) -> None:
    """A note on stderr where pictures are those that a defense was trained on."""
    trained = card.data if isinstance(card, Card) else {}
    if (trained.get("name"), trained.get("split")) == (pictures.name, pictures.split) and distributed.rank() == 0:
        print(
            f"note: {name} was trained on {pictures.name} {pictures.split}; numbers of other pictures say more (--split)",
            file=sys.stderr,
        )


def with_classes(pictures: Pictures, classes: tuple[str, ...], name: str) -> Pictures:
    """Pictures whose classes are numbered as a defense numbers them: by their names, else as they are.

    InputError where there are not as many; a note on stderr where names differ.
    """
    if len(pictures.class_names) != len(classes):
        raise InputError(f"{pictures.name} has {len(pictures.class_names)} classes, but {name} knows {len(classes)}")
    pictures = pictures.in_order_of(classes)
    pairs = zip(pictures.class_names, classes, strict=True)
    differing = [(theirs, ours) for theirs, ours in pairs if theirs.casefold() != ours.casefold()]
    known = {name.casefold() for name in classes}
    alone = [one for one, _ in differing if one.casefold() not in known]
    elsewhere = {one.casefold() for one, _ in differing} & {other.casefold() for _, other in differing}
    if elsewhere:
        raise InputError(
            f"{pictures.name} and {name} both know {min(elsewhere)!r}, but number it differently, and {name} does not know "
            f"{', '.join(map(repr, alone[:3]))}; give the classes the same names, one of {', '.join(map(repr, classes[:8]))}"
        )
    if differing and distributed.rank() == 0:
        theirs, ours = differing[0]
        print(
            f"note: {len(differing)} classes are called otherwise ({theirs!r} in {pictures.name}, {ours!r} in {name}, …); "
            "they are matched by number",
            file=sys.stderr,
        )
    return pictures
