"""Opens a finished run again: its settings, its model, its pictures, each checked to be what the run was made with."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from certipatch import report
from certipatch.attacks import find
from certipatch.cli.work import MAX_SHOWN, certify_shown, own_run
from certipatch.data import Pictures, load, read_picture
from certipatch.data.decoding import read_bytes
from certipatch.defenses import METHODS
from certipatch.errors import InputError
from certipatch.evaluation import attack as attacking
from certipatch.evaluation.claim import FREE, difference, plain
from certipatch.evaluation.evaluate import Job, summarize
from certipatch.models.adapters import NAMES, is_adapter
from certipatch.plumbing import devices, files
from certipatch.report.attack_page import of_attack
from certipatch.saved import Card, locate, read_card
from certipatch.saved.open import ClassifierInfo, DefenseRef, check_shape, open_named
from certipatch.threats import PatchThreat, Threat, threat_from_dict

MOVES = FREE | {"versions", "part", "dataset", "dataset_note"}
"""Settings that do not follow from the model and the pictures, or change with their folder's name."""


def rebuild(out: Path, data: str | None = None, model: str | None = None) -> Path:
    """Write the report of a finished run again, whole or not at all; gives its path.

    Args:
        out: a run folder of evaluate, attack or certify.
        data, model: where the pictures and the model are, if not where the run found them.

    Errors: InputError for an unfinished or foreign folder, and where data or model are missing or have changed.
    """
    config = files.read_config(out)
    command = _text(out, config, "command")
    if command == "evaluate":
        job, summary = open_run(out, data, model)
        text = report.of_run(job, out, summary)
    elif command == "attack":
        pictures, summary = open_attack(out, data, model)
        with _settings_of(out):
            text = of_attack(pictures, out, summary)
    elif command == "certify":
        if data is not None:
            raise InputError(
                "--data belongs to runs of evaluate and attack; config.yaml names the pictures of a run of certify"
            )
        text = _of_certify(out, config, model)
    else:
        raise InputError(f"{out} was written by {command[:40]!r}; report reads runs of evaluate, attack and certify")
    files.write_text(out / "report.html", text)
    return out / "report.html"


def open_run(out: Path, data: str | None = None, model: str | None = None) -> tuple[Job, dict[str, Any]]:
    """The job of a finished evaluation, ready to be looked at, and its summary, counted again from the records.

    Errors: as ``rebuild``.
    """
    config = files.read_config(out)
    command = _text(out, config, "command")
    if command != "evaluate":
        raise InputError(f"{out} was written by {command[:40]!r}, not by evaluate")
    with _settings_of(out):
        threat = threat_from_dict(config["threat"])
    defense, card, pictures, fingerprint = _opened(out, config, threat, data, model)
    name, device = _text(out, config, "defense"), devices.default()
    defense.to(device)
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
        engine=config.get("engine"),
    )
    _same(out, config, job.config(fingerprint))
    with _settings_of(out):
        summary = summarize(config, out, defense)
    return job, summary


def open_attack(out: Path, data: str | None = None, model: str | None = None) -> tuple[Pictures, dict[str, Any]]:
    """The pictures of a finished attack, and its summary, counted again from the records.

    Errors: as ``rebuild``.
    """
    config = files.read_config(out)
    with _settings_of(out):
        linf = config["threat"]["kind"] == "linf"
        epsilon = float(config["threat"]["epsilon"]) if linf else 0.0
        threat = None if linf else threat_from_dict(config["threat"])
        settings = dict(config["attack"])
        attack = find(settings.pop("name"))
    defense, card, pictures, fingerprint = _opened(out, config, threat or PatchThreat(1), data, model)
    with _settings_of(out):
        job = attacking.AttackJob(
            defense=defense,
            defense_name=_text(out, config, "defense"),
            model_sha256=card.sha256,
            image_size=card.image_size,
            class_names=card.classes,
            pictures=pictures,
            threat=threat,
            attack=attack,
            epsilon=epsilon,
            seed=config["seed"],
            **settings,
        )
        _same(out, config, job.config(fingerprint))
        return pictures, attacking.summarize_attack(config, out, defense)


def _opened(
    out: Path, config: dict[str, Any], threat: Threat, data: str | None, model: str | None
) -> tuple[Any, Card | ClassifierInfo, Pictures, str]:
    """The defense of a finished run, its card, its pictures and their fingerprint."""
    if not (out / "summary.json").exists():
        raise InputError(
            f"{out} is not finished: run the same certipatch {_text(out, config, 'command')[:40]} command again, it goes on "
            "from there"
        )
    source, split, dataset = (_text(out, config, key) for key in ("source", "split", "dataset"))
    with _settings_of(out):
        images = int(config["images"])
    defense, card = _reopen(out, config, threat, model)
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
    return defense, card, pictures, fingerprint


def _same(out: Path, config: dict[str, Any], own: dict[str, Any]) -> None:
    """InputError unless a run's settings are those of its model and pictures."""
    if key := difference(config, plain(own), MOVES):
        raise InputError(f"{out}: {key} in config.yaml is not what the model and the pictures of that run give")


def _reopen(out: Path, config: dict[str, Any], threat: Threat, model: str | None) -> tuple[Any, Card | ClassifierInfo]:
    """The defense of a run, from the model of the same weights, with the same settings."""
    name, method, wanted = (_text(out, config, key) for key in ("defense", "method", "model_sha256"))
    with _settings_of(out):
        settings = {key: value for key, value in config["settings"].items() if key != "threat"}
    place = model or (config["model"] if isinstance(config.get("model"), str) else name.rpartition(":")[2])
    around = name.startswith(f"{method}:") and method in METHODS
    if is_adapter(place) and not Path(place).is_dir():
        return _adapted(out, config, threat, model, place)
    try:
        found = read_card(locate(place))
        if found.sha256 == wanted and (around or found.defense == method):
            return open_named(
                DefenseRef(method, place, settings) if around else DefenseRef(place, None, settings), threat
            )[:2]
    except InputError as error:
        raise InputError(f"the model of {out} cannot be opened: {error}; name its place with --model") from None
    raise InputError(
        f"{place} is not the model of {out}: it is {found.defense} with the weights {found.sha256[:12]}…, the run's was "
        f"{method[:40]} with {wanted[:12]}…; name the right one with --model"
    )


def _adapted(
    out: Path, config: dict[str, Any], threat: Threat, model: str | None, place: str
) -> tuple[Any, Card | ClassifierInfo]:
    """The defense of a run around somebody else's classifier. What a run folder names is opened if it is ours to name."""
    if model is None and place not in NAMES:
        raise InputError(
            f"{out} was made with --model {place[:80]}; a run folder may not open that: add --model {place[:80]}"
        )
    with _settings_of(out):
        settings = {key: value for key, value in config["settings"].items() if key != "threat"}
        height, width = map(int, config["image_size"])
        classes = tuple(map(str, config["classes"])) if "classes" in config else None
    method, wanted = _text(out, config, "method"), _text(out, config, "model_sha256")
    defense, card, _ = open_named(DefenseRef(method, place, settings), threat, lambda: ([(height, width)], classes))
    if card.sha256 != wanted:
        raise InputError(f"{place} is not the model of {out}: other weights; name the right one with --model")
    return defense, card


def _of_certify(out: Path, config: dict[str, Any], model: str | None) -> str:
    """The report of a run of certify, from the picture files that it names, if they are still the same."""
    again = "run certipatch certify on the pictures again with a new --out"
    with _settings_of(out):
        threat = threat_from_dict(config["threat"])
        pictures = [(Path(one["file"]), one["sha256"]) for one in config["pictures"]]
    name, opened = _text(out, config, "defense"), model or _text(out, config, "model")
    defense, card = _reopen(out, config, threat, model)
    images = []
    for path, wanted in pictures:
        try:
            content = read_bytes(path)
        except InputError as error:
            raise InputError(f"a picture of {out}: {error}; or {again}") from None
        if hashlib.sha256(content).hexdigest() != wanted:
            raise InputError(f"{path} is no longer the picture that {out} certified; {again}")
        image = read_picture(path, card.image_size if card.resize else None, card.channels)
        check_shape((*image.shape[1:], image.shape[0]), card, str(path))
        images.append(image)
    if not images:
        raise InputError(f"{out} names no pictures; {again}")
    paths = [path for path, _ in pictures]
    results, shown, places = certify_shown(defense, card, torch.stack(images), paths, threat, MAX_SHOWN)
    own, summary = own_run(defense, card, name, opened, paths, threat, results)
    return report.page(own, summary, None, shown, places)


def _text(out: Path, config: dict[str, Any], key: str) -> str:
    if not isinstance(config.get(key), str):
        raise InputError(f"{out} holds damaged settings in config.yaml: {key} is no text")
    return config[key]


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
    raise InputError(
        f"{out} holds damaged settings in config.yaml or summary.json, or damaged records: {what}"
    ) from None
