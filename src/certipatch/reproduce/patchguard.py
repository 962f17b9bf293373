"""The tables of PatchGuard (Xiang et al. 2021) on our models, beside the paper's numbers.

Tables II, IV, VI and XXI are about attacks: ``patchguard_attacks``. The paper's BagNets were trained on
ImageNet first; ours were not.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from certipatch import evidence as ev
from certipatch.defenses import Defense
from certipatch.defenses.base import ViewDefense
from certipatch.defenses.settings import PatchGuardSettings
from certipatch.models import receptive_fields
from certipatch.reproduce import masking
from certipatch.reproduce.bench import Bench, Wanted, evidence_of
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.studies import Study
from certipatch.reproduce.table import Cell, NotRun, Number, Row, Share, Table
from certipatch.saved import open_defense, read_card
from certipatch.threats import PatchThreat
from certipatch.views import ReceptiveFields

SIDES = (0, 2, 4, 6, 8)
CLIPS = ((-torch.inf, torch.inf), (0.0, torch.inf), (0.0, 50.0), (0.0, 15.0), (0.0, 5.0))
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TIMED = (("plain", None), ("bagnet", None), ("bagnet", "patchguard"), ("columns", None), ("columns", "patchguard"))
BATCH, REPEATS = 50, 5
KINDS = ("logits", "confidence", "prediction")


def parameters(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table III: defaults."""
    settings = PatchGuardSettings()
    ours = [
        Row("PatchGuard on a network of local logits", ["logits", f"c_l = 0, c_h = ∞, T = {settings.threshold:g}"]),
        Row("PatchGuard on bands or blocks", ["confidence", f"c_l = 0, c_h = 1, T = {settings.threshold:g}"]),
    ]
    return Table(["evidence", "parameters"], ours + _paper(paper))


def comparison(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table V: every defense, clean and certified; and what the margin per location gives on the same votes."""
    bagnet, columns = study.model("bagnet"), study.model("columns")
    lines = [
        ("Mask-BN", bagnet, "patchguard", {"evidence": "logits"}),
        ("Mask-BN, confidence", bagnet, "patchguard", {"evidence": "confidence"}),
        ("Mask-DS", columns, "patchguard", {"evidence": "confidence"}),
        ("clipped BagNet", bagnet, "clipped-bagnet", {}),
        ("BagCert", bagnet, "bagcert", {}),
        ("DS, the paper's margin", columns, "derandomized-smoothing", {"margin": "paper"}),
        ("DS, margin per location", columns, "derandomized-smoothing", {"margin": "location"}),
        ("DS, top-1 votes, margin per location", columns, "derandomized-smoothing", {"threshold": None}),
    ]
    rows = [Row(label, _shares(bench, study, wanted, method, **settings)) for label, wanted, method, settings in lines]
    return Table(_pairs(study), rows + _paper(paper), bench.describe())


def receptive_field_sizes(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables IX and XVI."""
    rows = [
        Row(_named(bench, wanted), _shares(bench, study, wanted, "patchguard", evidence=_kind(bench, wanted)))
        for wanted in study.models
        if wanted.role.startswith("bagnet")
    ]
    return Table(_pairs(study), rows + _paper(paper), bench.describe())


def evidence_of_bagnet(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables XI and XVIII."""
    return _kinds(bench, study, paper, study.model("bagnet"))


def evidence_of_bands(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables XII and XIX."""
    return _kinds(bench, study, paper, study.model("columns"))


def _kinds(bench: Bench, study: Study, paper: Numbers, wanted: Wanted) -> Table:
    rows = [Row(kind, _shares(bench, study, wanted, "patchguard", evidence=kind)) for kind in KINDS]
    return Table(_pairs(study), rows + _paper(paper), bench.describe())


def invariance(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables VII and XIV: the sum of local logits when a window of cells is left out."""
    wanted = study.model("bagnet")
    columns = [f"{side}x{side}" for side in SIDES]
    labels = ("masked accuracy", "% pictures", "% windows per picture")
    folder = bench.folder(wanted)
    if folder is None:
        return Table(columns, [Row("all", [wanted.missing()]), *_paper(paper)], bench.describe())
    grid = _fields(bench, wanted).grid
    right, wrong, changed, n = {}, {}, {}, 0
    for logits, targets in bench.logits(folder):
        whole = masking.masked_predictions(logits, grid, 0)
        n += len(targets)
        for side in SIDES:
            if side <= min(grid):
                found = masking.masked_predictions(logits, grid, side)
                hits = found == targets[:, None]
                right[side] = right.get(side, 0.0) + float(hits.double().mean(1).sum())
                wrong[side] = wrong.get(side, 0) + int((~hits).any(1).sum())
                changed[side] = changed.get(side, 0.0) + float((found != whole).double().mean(1).sum())
    none = NotRun("larger than the map")
    rows = [
        Row(labels[0], [Number(100 * right[s] / n) if s in right else none for s in SIDES]),
        Row(labels[1], [Share(wrong[s], n) if s in wrong else none for s in SIDES]),
        Row(labels[2], [Number(100 * changed[s] / n, digits=2) if s in changed else none for s in SIDES]),
    ]
    notes = [*bench.describe(), f"{_named(bench, wanted)}: {grid[0]}x{grid[1]} cells"]
    return Table(columns, rows + _paper(paper), notes)


def clipping(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables VIII and XV: clean accuracy of the sum of clipped local logits."""
    rows = []
    for wanted in study.models:
        if not wanted.role.startswith("bagnet"):
            continue
        folder = bench.folder(wanted)
        if folder is None:
            rows.append(Row(wanted.name, [wanted.missing()]))
            continue
        right, n = [0] * len(CLIPS), 0
        for logits, targets in bench.logits(folder):
            n += len(targets)
            for i, (low, high) in enumerate(CLIPS):
                right[i] += int((masking.clipped_predictions(logits, low, high) == targets).sum())
        rows.append(Row(_named(bench, wanted), [Share(count, n) for count in right]))
    columns = [f"({low:g}, {high:g})".replace("inf", "∞").replace("-", "−") for low, high in CLIPS]
    return Table(columns, rows + _paper(paper), bench.describe())


def thresholds(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables X and XVII: false positives and causes of failure. The causes are of the rule that holds, see notes."""
    wanted, patch = study.model("bagnet"), study.patches[1]
    columns = ["clean", "certified", "false positives", *masking.CAUSES, "rounding"]
    folder = bench.folder(wanted)
    if folder is None:
        rows = [Row("all", [wanted.missing()]), *_paper(paper)]
        return Table(columns, rows, bench.describe())
    card, threat = read_card(folder), PatchThreat(patch)
    size, probe = card.image_size, bench.probe(card)
    kind, rows = _kind(bench, wanted), []
    for threshold in THRESHOLDS:
        defense = bench.defense(folder, "patchguard", threat, evidence=kind, threshold=threshold)
        rule, relation = defense.rule(size), defense.relation(threat, size)
        counts, n = [0] * len(columns), 0
        for logits, targets in bench.logits(folder):
            evidence = evidence_of(defense, logits, probe)
            found = defense.certificate(evidence, threat)
            right = found.label == targets
            left = right & ~found.certified
            cause = masking.failure_cause(
                evidence.values[left],
                found.label[left],
                relation.rows[relation.undominated],
                rule,  # type: ignore[arg-type]
            )
            false = masking.windows_masked(evidence.values, rule)  # type: ignore[arg-type]
            new = [right, right & found.certified, false]
            new += [cause == number for number in (*range(len(masking.CAUSES)), -1)]
            counts = [count + int(more.sum()) for count, more in zip(counts, new, strict=True)]
            n += len(targets)
        rows.append(Row(f"T = {threshold:.1f}", [Share(count, n) for count in counts]))
    notes = [
        *bench.describe(),
        f"{study.patch_words()[1]} patch; evidence of ours: {kind}, of {_named(bench, wanted)}",
        "the paper's causes belong to its printed algorithms, which do not hold: I/IV no window detected, II a benign "
        "one detected, III the malicious one in part",
        "ours: the least that an attack needs. exact: evidence outside the patch favours a rival; rival unmasked: it "
        "also keeps evidence that its own mask does not take; benign window: the true class loses one that the patch "
        "does not touch; overlapping window: it loses one that the patch feeds until it is masked",
    ]
    return Table(columns, rows + _paper(paper), notes)


def inference_time(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables XIII and XX: milliseconds per picture of network and rule, in batches."""
    rows = []
    for role, method in TIMED:
        wanted = study.model(role)
        label = wanted.name if method is None else f"{wanted.name} with robust masking"
        rows.append(Row(label, [_time(bench, study, wanted, method)]))
    note = (
        f"this machine: {torch.get_num_threads()} threads, batches of {BATCH}, median of {REPEATS}; the paper: one P100 "
        "and single pictures"
    )
    return Table(["per picture"], rows + _paper(paper), [note])


def _time(bench: Bench, study: Study, wanted: Wanted, method: str | None) -> Cell:
    folder = bench.folder(wanted)
    if folder is None:
        return wanted.missing()
    card = read_card(folder)
    pictures = bench.pictures(card)
    images = pictures.images(range(min(BATCH, len(pictures))))
    defense: Defense = open_defense(str(folder))[0]
    if method is not None:
        defense = bench.defense(folder, method, PatchThreat(study.patches[1]))
    run: Callable[[Tensor], object] = defense.predict
    if method is None and isinstance(defense, ViewDefense):
        run = partial(ev.logits, defense.model, defense.views_of(card.image_size))
    run(images)
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run(images)
        spent.append(time.perf_counter() - started)
    return Number(1000 * statistics.median(spent) / len(images), " ms", 2)


def _pairs(study: Study) -> list[str]:
    return [f"{words} {what}" for words in study.patch_words() for what in ("clean", "certified")]


def _shares(bench: Bench, study: Study, wanted: Wanted, method: str, **settings: object) -> list[Cell]:
    cells: list[Cell] = []
    for patch in study.patches:
        found = bench.outcomes(wanted, method, patch, **settings)
        if isinstance(found, NotRun):
            return [found]
        cells += found.shares()
    return cells


def _kind(bench: Bench, wanted: Wanted) -> str:
    """The evidence that the model's card names, else logits."""
    folder = bench.folder(wanted)
    return (folder and read_card(folder).settings.get("evidence")) or "logits"


def _fields(bench: Bench, wanted: Wanted) -> ReceptiveFields:
    folder = bench.folder(wanted)
    assert folder is not None
    card = read_card(folder)
    return receptive_fields(card.network().eval(), card.image_size)


def _named(bench: Bench, wanted: Wanted) -> str:
    if bench.folder(wanted) is None:
        return wanted.name
    fields = _fields(bench, wanted)
    return f"{wanted.name}, field {fields.size[0]}x{fields.size[1]}"


def _paper(numbers: Numbers) -> list[Row]:
    return [Row(label, list(cells), "paper") for label, cells in numbers.items()]
