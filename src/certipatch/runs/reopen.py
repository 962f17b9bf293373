"""Opens a finished run again: its settings, its model, its images, each checked to be the run's own."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from certipatch.attacks import find
from certipatch.data import Pictures, load
from certipatch.data.decoding import read_bytes
from certipatch.defenses import METHODS
from certipatch.errors import InputError
from certipatch.models.adapters import NAMES, is_adapter
from certipatch.plumbing import devices, files
from certipatch.plumbing.distributed import Workers
from certipatch.runs.attack import AttackJob, summarize_attack
from certipatch.runs.certify import Report, certify_config_and_summary, certify_images, read_image
from certipatch.runs.evaluate import Job, summarize
from certipatch.runs.experiment import Experiment
from certipatch.runs.folder import IGNORED_KEYS, difference, yaml_round_trip
from certipatch.runs.verify import check_digests
from certipatch.saved import Card, ClassifierInfo, DefenseRef, locate, read_card
from certipatch.saved.open import check_shape, open_named
from certipatch.threats import PatchThreat, Threat, threat_from_dict

RELOCATABLE_KEYS = IGNORED_KEYS | {"versions", "part", "dataset", "dataset_note"}
"""Settings that do not follow from the model and the images, or change with their folder's name."""


def reopen_evaluation(out: Path, data: str | None = None, model: str | None = None) -> tuple[Job, dict[str, Any]]:
    """The job of a finished evaluation, ready for a report, and its summary, counted again from the records.

    Args:
        out: the run folder.
        data, model: the places of the images and the model; the run's own by default.

    Errors: InputError for an unfinished or foreign folder, and if data or model are missing or have changed.
    """
    config = files.read_config(out)
    if (command := command_of(out)) != "evaluate":
        raise InputError(f"{out} was written by {command[:40]!r}, not by evaluate")
    with one_line_errors(out):
        threat = threat_from_dict(config["threat"])
    opened, fingerprint = _reopen_experiment(out, config, threat, data, model)
    job = Job(**opened.job(), threat=threat, seed=opened.card.seed, engine=config.get("engine"))
    _check_same(out, config, job.config(fingerprint))
    with one_line_errors(out):
        check_digests(out, config)
        summary = summarize(config, out, opened.defense)
    return job, summary


def reopen_attack(out: Path, data: str | None = None, model: str | None = None) -> tuple[Pictures, dict[str, Any]]:
    """The images of a finished attack, and its summary, counted again from the records. As ``reopen_evaluation``."""
    config = files.read_config(out)
    with one_line_errors(out):
        linf = config["threat"]["kind"] == "linf"
        epsilon = float(config["threat"]["epsilon"]) if linf else 0.0
        threat = None if linf else threat_from_dict(config["threat"])
        settings = dict(config["attack"])
        attack = find(settings.pop("name"))
    opened, fingerprint = _reopen_experiment(out, config, threat or PatchThreat(1), data, model)
    with one_line_errors(out):
        job = AttackJob(**opened.job(), threat=threat, attack=attack, epsilon=epsilon, seed=config["seed"], **settings)
        _check_same(out, config, job.config(fingerprint))
        check_digests(out, config)
        return opened.pictures, summarize_attack(config, out, opened.defense)


def reopen_certify(out: Path, model: str | None, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and summary of a run of certify; ``report`` gets its images again, if they are still the same."""
    config, again = files.read_config(out), "run certipatch certify on the pictures again with a new --out"
    with one_line_errors(out):
        threat = threat_from_dict(config["threat"])
        pictures = [(Path(one["file"]), one["sha256"]) for one in config["pictures"]]
    name, opened = _text(out, config, "defense"), model or _text(out, config, "model")
    defense, card = _reopen_defense(out, config, threat, model)
    images = []
    for path, wanted in pictures:
        try:
            content = read_bytes(path)
        except InputError as error:
            raise InputError(f"a picture of {out}: {error}; or {again}") from None
        if hashlib.sha256(content).hexdigest() != wanted:
            raise InputError(f"{path} is no longer the picture that {out} certified; {again}")
        images.append(read_image(path, card))
    if not images:
        raise InputError(f"{out} names no pictures; {again}")
    paths = [path for path, _ in pictures]
    results = certify_images(defense, card, torch.stack(images), paths, threat, report)
    return certify_config_and_summary(defense, card, name, opened, paths, threat, results)


def command_of(out: Path) -> str:
    """The command that wrote a run folder."""
    return _text(out, files.read_config(out), "command")


def _reopen_experiment(
    out: Path, config: dict[str, Any], threat: Threat, data: str | None, model: str | None
) -> tuple[Experiment, str]:
    """The defense and the images of a finished run, and the images' fingerprint."""
    if not (out / "summary.json").exists():
        raise InputError(
            f"{out} is not finished: run the same certipatch {_text(out, config, 'command')[:40]} command again, it goes on "
            "from there"
        )
    source, split, dataset = (_text(out, config, key) for key in ("source", "split", "dataset"))
    with one_line_errors(out):
        images = int(config["images"])
    defense, card = _reopen_defense(out, config, threat, model)
    source, size = data or source, card.image_size if card.resize else None
    try:
        pictures = load(source, split, size=size, channels=card.channels, limit=images)
    except InputError as error:
        raise InputError(f"the pictures of {out} cannot be opened: {error}; name their place with --data") from None
    pictures = pictures.in_order_of(card.classes)
    fingerprint = pictures.fingerprint()
    if fingerprint != config.get("dataset_sha256"):
        raise InputError(
            f"{source} {split} does not hold the pictures of {out} (the fingerprint differs: other pictures, order or "
            f"labels); name the {dataset[:80]} of that run with --data, or make the run again into a new --out"
        )
    check_shape(pictures.pixels([0])[0].shape, card, pictures.name)
    name, device = _text(out, config, "defense"), devices.default()
    defense.to(device)
    return Experiment(defense, card, name, None, pictures, device, Workers()), fingerprint


def _check_same(out: Path, config: dict[str, Any], own: dict[str, Any]) -> None:
    """InputError unless a run's settings are those of its model and images."""
    if key := difference(config, yaml_round_trip(own), RELOCATABLE_KEYS):
        raise InputError(f"{out}: {key} in config.yaml does not follow from the model and the pictures of that run")


def _reopen_defense(
    out: Path, config: dict[str, Any], threat: Threat, model: str | None
) -> tuple[Any, Card | ClassifierInfo]:
    """The defense of a run, from the model of the same weights, with the same settings."""
    name, method, wanted = (_text(out, config, key) for key in ("defense", "method", "model_sha256"))
    with one_line_errors(out):
        settings = {key: value for key, value in config["settings"].items() if key != "threat"}
    place = model or (config["model"] if isinstance(config.get("model"), str) else name.rpartition(":")[2])
    wrapped = name.startswith(f"{method}:") and method in METHODS
    if is_adapter(place) and not Path(place).is_dir():
        return _reopen_wrapped(out, config, threat, model, place)
    try:
        card = read_card(locate(place))
        if card.sha256 == wanted and (wrapped or card.defense == method):
            ref = DefenseRef(method, place, settings) if wrapped else DefenseRef(place, None, settings)
            return open_named(ref, threat)[:2]
    except InputError as error:
        raise InputError(f"the model of {out} cannot be opened: {error}; name its place with --model") from None
    raise InputError(
        f"{place} is not the model of {out}: it is {card.defense} with the weights {card.sha256[:12]}…, the run's was "
        f"{method[:40]} with {wanted[:12]}…; name the right one with --model"
    )


def _reopen_wrapped(
    out: Path, config: dict[str, Any], threat: Threat, model: str | None, place: str
) -> tuple[Any, Card | ClassifierInfo]:
    """The defense of a run around somebody else's classifier.

    A run folder may only load models from our own list; any other must be confirmed with ``model``.
    """
    if model is None and place not in NAMES:
        raise InputError(
            f"{out} was made with --model {place[:80]}; a run folder may not open that: add --model {place[:80]}"
        )
    with one_line_errors(out):
        settings = {key: value for key, value in config["settings"].items() if key != "threat"}
        height, width = map(int, config["image_size"])
        classes = tuple(map(str, config["classes"])) if "classes" in config else None
    method, wanted = _text(out, config, "method"), _text(out, config, "model_sha256")
    defense, card, _ = open_named(DefenseRef(method, place, settings), threat, lambda: ([(height, width)], classes))
    if card.sha256 != wanted:
        raise InputError(f"{place} is not the model of {out}: other weights; name the right one with --model")
    return defense, card


def _text(out: Path, config: dict[str, Any], key: str) -> str:
    if not isinstance(config.get(key), str):
        raise InputError(f"{out} holds damaged settings in config.yaml: {key} is no text")
    return config[key]


@contextmanager
def one_line_errors(out: Path) -> Iterator[None]:
    """Turn the errors of a damaged config.yaml or summary.json into one clear line."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        _damaged(out, error)


def _damaged(out: Path, error: Exception) -> NoReturn:
    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:120]
    raise InputError(
        f"{out} holds damaged settings in config.yaml or summary.json, or damaged records: {what}"
    ) from None
