"""Opens a finished run again: its settings, its model, its pictures, each checked to be what the run was made with."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from certipatch import devices, report
from certipatch.cli.work import MAX_SHOWN, certify_shown, check_shape, open_named
from certipatch.data import load, read_picture
from certipatch.defenses import METHODS, Card, Defense
from certipatch.errors import InputError
from certipatch.evaluation import files, run
from certipatch.threats import Threat, threat_from_dict


def rebuild(out: Path, data: str | None = None, model: str | None = None) -> Path:
    """Write the report of a finished run again, whole or not at all; gives its path.

    Args:
        out: a run folder of evaluate or certify.
        data, model: where the pictures and the model are, if not where the run found them.

    Errors: InputError for an unfinished or foreign folder, and where data or model are missing or have changed.
    """
    config = files.read_config(out)
    if config["command"] == "evaluate":
        job, summary = open_run(out, data, model)
        text = report.of_run(job, out, summary)
    elif config["command"] == "certify":
        if data is not None:
            raise InputError(
                "--data belongs to runs of evaluate; the pictures of certify are those that config.yaml names"
            )
        text = _of_certify(out, config, model)
    else:
        raise InputError(
            f"{out} was written by {str(config['command'])[:40]!r}; report reads runs of evaluate and certify"
        )
    files.write_text(out / "report.html", text)
    return out / "report.html"


def open_run(out: Path, data: str | None = None, model: str | None = None) -> tuple[run.Job, dict[str, Any]]:
    """The job of a finished evaluation, ready to be looked at, and its summary, counted again from the records.

    Errors: as ``rebuild``.
    """
    config = files.read_config(out)
    if config["command"] != "evaluate":
        raise InputError(f"{out} was written by {str(config['command'])[:40]!r}, not by evaluate")
    if not (out / "summary.json").exists():
        raise InputError(
            f"{out} is not finished: run the same certipatch evaluate command again, it goes on from there"
        )
    with _settings_of(out):
        threat = threat_from_dict(config["threat"])
        source, split, images = str(data or config["source"]), str(config["split"]), int(config["images"])
        dataset, wanted = str(config["dataset"]), str(config["dataset_sha256"])
    defense, card, name = _reopen(out, config, threat, model)
    size = card.image_size if card.resize else None
    try:
        pictures = load(source, split, size=size, limit=images)
    except InputError as error:
        raise InputError(f"the pictures of {out} cannot be opened: {error}; name their place with --data") from None
    if pictures.fingerprint() != wanted:
        raise InputError(
            f"{source} {split} does not hold the pictures of {out} (the fingerprint differs: other pictures, order or "
            f"labels); name the {dataset} of that run with --data, or evaluate again into a new --out"
        )
    check_shape(pictures.pixels([0])[0].shape, card, pictures.name)
    device = devices.default()
    defense.to(device)
    job = run.Job(defense, name, card.sha256, card.image_size, card.classes, pictures, threat, card.seed, device)
    with _settings_of(out):
        summary = run.summarize(config, out, defense)
    return job, summary


def _reopen(out: Path, config: dict[str, Any], threat: Threat, model: str | None) -> tuple[Defense, Card, str]:
    """The defense of a run, from the model of the same weights, with the same settings."""
    with _settings_of(out):
        name, method, wanted = str(config["defense"]), str(config["method"]), str(config["model_sha256"])
        settings = {key: value for key, value in config["settings"].items() if key != "threat"}
    place = model or config.get("model") or name.rpartition(":")[2]
    around = name.startswith(f"{method}:") and method in METHODS
    try:
        if around:
            defense, card, found = open_named(method, str(place), threat, settings)
        else:
            defense, card, found = open_named(str(place), None, threat, settings)
    except InputError as error:
        raise InputError(f"the model of {out} cannot be opened: {error}; name its place with --model") from None
    if card.sha256 != wanted:
        raise InputError(
            f"{place} is not the model of {out}: its weights are {card.sha256[:12]}…, the run's were {wanted[:12]}…; name "
            "the right one with --model"
        )
    if defense.name != method:
        raise InputError(
            f"{place} is {defense.name}, but {out} evaluated {method[:40]}; name the right one with --model"
        )
    return defense, card, found


def _of_certify(out: Path, config: dict[str, Any], model: str | None) -> str:
    """The report of a run of certify, from the picture files that it names, if they are still the same."""
    again = "run certipatch certify on the pictures again with a new --out"
    with _settings_of(out):
        threat = threat_from_dict(config["threat"])
        pictures = [(Path(one["file"]), str(one["sha256"])) for one in config["pictures"]]
        summary = files.read_json(out / "summary.json")
    defense, card, _ = _reopen(out, config, threat, model)
    images = []
    for path, wanted in pictures:
        try:
            same = hashlib.sha256(path.read_bytes()).hexdigest() == wanted
        except OSError as error:
            raise InputError(f"{path}, a picture of {out}, cannot be read ({error.strerror}); {again}") from None
        if not same:
            raise InputError(f"{path} is no longer the picture that {out} certified; {again}")
        image = read_picture(path, size=card.image_size if card.resize else None)
        check_shape((*image.shape[1:], image.shape[0]), card, str(path))
        images.append(image)
    if not images:
        raise InputError(f"{out} names no pictures; {again}")
    paths = [path for path, _ in pictures]
    results, shown, places = certify_shown(defense, card, torch.stack(images), paths, threat, MAX_SHOWN)
    with _settings_of(out):
        summary |= {"images": len(results), "certified": sum(result["certified"] for result in results)}
        return report.page(config, summary, None, shown, places)


@contextmanager
def _settings_of(out: Path) -> Iterator[None]:
    """Turns what a damaged config.yaml or summary.json leads to into one clear line."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        _damaged(out, error)


def _damaged(out: Path, error: Exception) -> NoReturn:
    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:120]
    raise InputError(f"{out} holds damaged settings in config.yaml or summary.json: {what}") from None
