"""Measurements: each gives the values of cells by name, or the cost of the model if the model is missing."""

import json
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from certipatch import evidence as ev
from certipatch.defenses import Defense
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.interval_bounds import IntervalBounds
from certipatch.defenses.randomized_ablation import RandomizedAblation
from certipatch.errors import InputError
from certipatch.models import receptive_fields
from certipatch.reproduce import interval_models, masking
from certipatch.reproduce.aggregation import aggregated
from certipatch.reproduce.attacked import AttackResult, attacked, target
from certipatch.reproduce.context import Outcomes, ReproductionContext, evidence_of, missing
from certipatch.reproduce.schema import Ablation, Measurement, ModelSlot, Paper, Strength, Study
from certipatch.reproduce.table import Cell, NotRun, Number, Share
from certipatch.saved import Card, open_defense, read_card
from certipatch.threats import PatchThreat
from certipatch.views import RandomPixels, ReceptiveFields
from certipatch.views import create as create_views
from certipatch.views.incidence import sees

Values = dict[str, Cell]
BATCH, REPEATS = 50, 5  # of times
DRAWS = 100  # of random pixels, per image, for the accuracy on single views


def measure(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Cell:
    """The value of a cell. Values that are measured together are measured once."""
    if cell.not_run:
        return NotRun(cell.not_run)
    key = json.dumps([study.data, study.patch, cell.model_dump(mode="json", include=MEASURED)], sort_keys=True)
    if key not in context.measured:
        context.measured[key] = MEASURES[cell.measure](context, paper, study, cell)
    values = context.measured[key]
    return values if isinstance(values, NotRun) else values[cell.show]


def slot_of(study: Study, cell: Measurement) -> ModelSlot:
    """The model of a cell."""
    if not cell.strategy:
        return study.model(cell.model)
    size = cell.trained_for or cell.pixels or cell.patch
    assert isinstance(size, int)
    return interval_models.trained(study.data, cell.model, cell.strategy, size).slot


def outcomes(context: ReproductionContext, study: Study, cell: Measurement) -> Outcomes | NotRun:
    """Verdicts on all images of a cell."""
    slot = slot_of(study, cell)
    folder = context.folder(slot)
    if folder is None:
        return missing(slot)
    card = read_card(folder)
    kept = {name: card.settings[name] for name in cell.card_settings if card.settings.get(name)}
    return context.outcomes(slot, _method(cell) or card.defense, cell.threat(study), **cell.settings | kept)


def halves(images: int) -> tuple[slice, slice]:
    """Validation half and test half: 5,000 and 5,000 of the 10,000 images that the smoothing paper has."""
    if images < 2:
        raise InputError("one picture cannot be halved into validation and test; give at least 2")
    return slice(0, images // 2), slice(images // 2, images)


def half(whole: Outcomes, name: str) -> Outcomes:
    """The verdicts on the images of a half, or on all."""
    if name == "all":
        return whole
    chosen = halves(len(whole.right))[name == "test"]
    return Outcomes(whole.right[chosen], whole.certified[chosen])


def certify(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values | NotRun:
    """Clean and certified accuracy; with the mean over seeds if there are further seeds of the model."""
    whole = outcomes(context, study, cell)
    if isinstance(whole, NotRun):
        return whole
    runs = [half(whole, cell.half)]
    for seed in slot_of(study, cell).seeds:
        other = context.outcomes(seed, _method(cell) or "", cell.threat(study), **cell.settings)
        runs += [] if isinstance(other, NotRun) else [half(other, cell.half)]
    values: Values = {}
    for which, name in enumerate(("clean", "certified")):
        share, percents = runs[0].shares()[which], [run.shares()[which].percent for run in runs]
        mean = f"mean of {len(runs)} seeds {sum(percents) / len(runs):.1f}, {min(percents):.1f} to {max(percents):.1f}"
        values[name] = Share(share.count, share.n, mean if len(runs) > 1 else "")
    return values


def strength_of(paper: Paper, cell: Measurement) -> Strength:
    """The attack of a cell. An undefended network has no defense to know, so every attack on it is adaptive."""
    adaptive = cell.adaptive or cell.method is None
    changes = {"adaptive": adaptive, "epsilon": float(Fraction(cell.epsilon or 0))}
    return paper.attacks[cell.attack].model_copy(update=changes)


def attack(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values | NotRun:
    """Clean, attacked and certified accuracy."""
    threat = None if cell.epsilon else cell.threat(study)
    victim = target(context, slot_of(study, cell), threat, cell.method, **cell.settings)
    if isinstance(victim, NotRun):
        return victim
    if cell.aggregation:
        assert isinstance(threat, PatchThreat)
        victim = aggregated(victim, cell.aggregation, threat)
        if victim is None:
            return NotRun("it has a defense")
    result: AttackResult = attacked(context, victim, threat, strength_of(paper, cell))
    return {"clean": result.clean, "attacked": result.attacked, "certified": result.certified}


def points_lost(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values | NotRun:
    """Points of attacked accuracy that a defense loses if the attack knows it."""
    changes = {"measure": "attack", "show": "attacked"}
    plain, adaptive = (
        measure(context, paper, study, cell.model_copy(update=changes | {"adaptive": adaptive}))
        for adaptive in (False, True)
    )
    if isinstance(plain, NotRun):
        return plain
    assert isinstance(plain, Share)
    assert isinstance(adaptive, Share)
    return {"points lost": Number(plain.percent - adaptive.percent)}


def hours(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values:
    """Hours of training, from the card."""
    folder = context.folder(slot_of(study, cell))
    seconds = None if folder is None else read_card(folder).training.get("seconds")
    return {"training": "" if seconds is None else Number(float(seconds) / 3600, " h", 2)}


def clip(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values | NotRun:
    """Clean accuracy of the sum of clipped local logits."""
    slot = slot_of(study, cell)
    folder = context.folder(slot)
    if folder is None:
        return missing(slot)
    low, high = cell.settings["clip"]
    right = [masking.clipped_predictions(logits, low, high) == targets for logits, targets in context.logits(folder)]
    return {"clean": _share(right)}


def mask(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values | NotRun:
    """The sum of local logits when a window of cells is left out: accuracy, images with an error, windows that change it."""
    slot, side = slot_of(study, cell), cell.settings["side"]
    folder = context.folder(slot)
    if folder is None:
        return missing(slot)
    grid = fields_of(read_card(folder)).grid
    if side > min(grid):
        return NotRun("larger than the map")
    hits, changed = [], []
    for logits, targets in context.logits(folder):
        predictions = masking.masked_predictions(logits, grid, side)
        hits.append(predictions == targets[:, None])
        changed.append(predictions != masking.masked_predictions(logits, grid, 0))
    right, turned = torch.cat(hits), torch.cat(changed)
    return {
        "masked accuracy": Number(100 * float(right.double().mean())),
        "% pictures": _share([(~right).any(1)]),
        "% windows per picture": Number(100 * float(turned.double().mean()), digits=2),
    }


def failures(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values | NotRun:
    """Robust masking: clean and certified accuracy, false positives, and the images without a certificate by cause."""
    slot, threat = slot_of(study, cell), cell.threat(study)
    folder = context.folder(slot)
    if folder is None:
        return missing(slot)
    card = read_card(folder)
    size, probe = card.image_size, context.probe(card)
    kept = {name: card.settings[name] for name in cell.card_settings if card.settings.get(name)}
    defense = context.defense(folder, "patchguard", threat, **cell.settings | kept)
    rule, relation = defense.rule(size), defense.relation(threat, size)
    counts: dict[str, list[Tensor]] = {}
    for logits, targets in context.logits(folder):
        evidence = evidence_of(defense, logits, probe)
        certificate = defense.certificate(evidence, threat)
        right = certificate.label == targets
        open_ = right & ~certificate.certified
        cause = torch.full((len(right),), len(masking.CAUSES) + 1)
        cause[open_] = masking.failure_cause(
            evidence.values[open_],
            certificate.label[open_],
            relation.rows[relation.undominated],
            rule,  # type: ignore[arg-type]
        )
        part = {
            "clean": right,
            "certified": right & certificate.certified,
            "false positives": masking.windows_masked(evidence.values, rule),  # type: ignore[arg-type]
            **{name: cause == number for number, name in enumerate(masking.CAUSES)},
            "rounding": cause == -1,
        }
        for name, flags in part.items():
            counts.setdefault(name, []).append(flags)
    return {name: _share(parts) for name, parts in counts.items()}


def inference_time(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values | NotRun:
    """Milliseconds per image of the network, or of a method around it, in batches."""
    slot = slot_of(study, cell)
    folder = context.folder(slot)
    if folder is None:
        return missing(slot)
    card = read_card(folder)
    pictures = context.pictures(card)
    images = pictures.images(range(min(BATCH, len(pictures))))
    defense: Defense = open_defense(str(folder))[0]
    if cell.method is not None:
        defense = context.defense(folder, cell.method, cell.threat(study))
    run: Callable[[Tensor], object] = defense.predict
    if cell.method is None and isinstance(defense, ViewDefense):
        run = partial(ev.logits, defense.model, defense.views_of(card.image_size))
    run(images)
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run(images)
        spent.append(time.perf_counter() - started)
    return {"per picture": Number(1000 * statistics.median(spent) / len(images), " ms", 2)}


def single_views(context: ReproductionContext, paper: Paper, study: Study, cell: Measurement) -> Values:
    """Visible pixels per view, Δ (the largest chance that a view meets the patch), and accuracy of single views."""
    slot = slot_of(study, cell)
    assert isinstance(slot, Ablation)
    pixels, delta = visible_and_touched(slot, study)
    accuracy = accuracy_of_views(context, slot)
    shown: Cell = accuracy if isinstance(accuracy, NotRun) else Number(100 * accuracy, " %")
    return {"pixels shown": Number(pixels, digits=0), "Δ": Number(delta, digits=3), "accuracy of single views": shown}


def visible_and_touched(ablation: Ablation, study: Study) -> tuple[int, float]:
    """Visible pixels per view, and Δ."""
    size, side = study.image_size, study.patch
    assert size is not None
    assert isinstance(side, int)
    if ablation.kind == "pixels":
        views = RandomPixels(ablation.size)
        return ablation.size, float(views.chance(torch.tensor([side**2]), size)[0])
    views = create_views(dict(ablation.views))
    relation = sees(views, PatchThreat(side), size)  # type: ignore[arg-type]
    return int(views.visible(size)[0].sum()), int(relation.sizes.max()) / relation.number_of_views  # type: ignore


def accuracy_of_views(context: ReproductionContext, ablation: Ablation) -> float | NotRun:
    """Mean share of single views whose top class is right, over the validation half."""
    folder = context.folder(ablation)
    if folder is None:
        return missing(ablation)
    if ablation.kind == "pixels":
        changes = {"samples": 1, "samples_to_pick": DRAWS}
        defense = open_defense(RandomizedAblation.name, str(folder), None, changes)[0]
        assert isinstance(defense, RandomizedAblation)
        parts = context.counts(read_card(folder), defense)
        shares = [votes[:, 0].gather(1, targets[:, None])[:, 0].double() / DRAWS for votes, targets in parts]
    else:
        parts = context.logits(folder)
        shares = [(logits.argmax(2) == targets[:, None]).double().mean(1) for logits, targets in parts]
    every = torch.cat(shares)
    return float(every[halves(len(every))[0]].mean())


def fields_of(card: Card) -> ReceptiveFields:
    """The receptive fields of a network of local logits."""
    return receptive_fields(card.network().eval(), card.image_size)


def _method(cell: Measurement) -> str | None:
    """The defense around the network; the models of training strategies are of interval bounds."""
    return IntervalBounds.name if cell.strategy else cell.method


def _share(flags: list[Tensor]) -> Share:
    every = torch.cat(flags)
    return Share(int(every.sum()), len(every))


MEASURED = set(Measurement.model_fields) - {"show", "not_run"}
MEASURES: dict[str, Callable[[ReproductionContext, Paper, Study, Measurement], Values | NotRun]] = {
    "certify": certify,
    "attack": attack,
    "points lost": points_lost,
    "hours": hours,
    "clip": clip,
    "mask": mask,
    "failures": failures,
    "time": inference_time,
    "single views": single_views,
}
