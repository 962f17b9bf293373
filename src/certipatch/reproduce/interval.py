"""The tables of Chiang et al. 2020, *Certified Defenses for Adversarial Patches*, on our models, beside the paper's numbers.

Every table is made for MNIST or CIFAR-10, as the data say. A cell without its model says what its training takes; a note
gives the command.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from certipatch.defenses import IntervalBounds, RandomizedAblation
from certipatch.errors import InputError
from certipatch.plumbing import devices
from certipatch.reproduce.bench import PART, Bench, Outcomes, Wanted
from certipatch.reproduce.interval_models import COMPARED, NETWORKS, OURS, RECIPES, STRATEGIES, Trained, trained
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.studies import Study
from certipatch.reproduce.table import Cell, NotRun, Number, Row, Share, Table
from certipatch.saved import open_defense, read_card
from certipatch.saved.weights import write_tensors
from certipatch.threats import PatchThreat, SparseThreat, Threat

SHAPES = ("square", "rectangle", "line", "diamond", "parallelogram")


def outcomes(bench: Bench, wanted: Wanted, threat: Threat) -> Outcomes | NotRun:
    """What interval bounds make of every picture; kept in the bench's folder. InputError for another method's model."""
    folder = bench.folder(wanted)
    if folder is None:
        return wanted.missing()
    card = read_card(folder)
    if card.defense != IntervalBounds.name:
        raise InputError(f"{folder}: its defense is {card.defense}; this table is of {IntervalBounds.name}")
    pictures = bench.pictures(card)
    asked = json.dumps([card.sha256, bench.fingerprint(card), IntervalBounds.name, threat.to_dict()], sort_keys=True)
    path = bench.out / "outcomes" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.safetensors"
    try:
        kept = load_file(path)
        right, certified = kept["first"].bool(), kept["second"].bool()
        if len(right) == len(certified) == len(pictures):
            return Outcomes(right, certified)
    except (OSError, KeyError, SafetensorError):
        pass
    device = devices.default()
    defense = open_defense(str(folder), threat=threat)[0].to(device)
    assert isinstance(defense, IntervalBounds)
    found: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(pictures), PART):
        indices = range(first, min(first + PART, len(pictures)))
        evidence = defense.evidence(pictures.images(indices).to(device))
        right = defense.label(evidence).cpu() == torch.from_numpy(pictures.labels[indices.start : indices.stop])
        found.append((right, right & defense.certified(evidence, threat).cpu()))
        bench.progress(indices[-1] + 1, len(pictures), f"{card.name}, {threat}")
    right, certified = (torch.cat(parts) for parts in zip(*found, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"first": right, "second": certified}, {"asked": asked})
    return Outcomes(right, certified)


def accuracies(bench: Bench, model: Trained, threat: Threat) -> tuple[Cell, Cell]:
    """Clean and certified accuracy of a model; where further seeds of it are there, with their mean."""
    found = outcomes(bench, model.wanted, threat)
    if isinstance(found, NotRun):
        return found, found
    others = [outcomes(bench, seed, threat) for seed in model.seeds()]
    every = [found, *(other for other in others if isinstance(other, Outcomes))]
    cells: list[Cell] = []
    for which in (0, 1):
        share = found.shares()[which]
        values = [outcome.shares()[which].percent for outcome in every]
        mean = f"mean of {len(values)} seeds {sum(values) / len(values):.1f}, {min(values):.1f} to {max(values):.1f}"
        cells.append(Share(share.count, share.n, mean if len(values) > 1 else ""))
    return cells[0], cells[1]


def hours(bench: Bench, model: Trained) -> Cell:
    """Of its training, as its card says."""
    folder = bench.folder(model.wanted)
    seconds = None if folder is None else read_card(folder).training.get("seconds")
    return "" if seconds is None else Number(float(seconds) / 3600, " h", 2)


def comparison(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 2: interval bounds beside other defenses; those and attacks are not of this table's models."""
    rows, models = [], []
    for side in study.patches:
        assert isinstance(side, int)
        model = trained(study.data, *RECIPES[study.data], side)
        models.append(model)
        clean, certified = accuracies(bench, model, PatchThreat(side))
        attack = NotRun("not run (certipatch reproduce ibp-table2-attacked)")
        rows.append(Row(f"{side}x{side}, IBP, {_named(study)}", [clean, attack, certified]))
        rows += _of_paper(paper, f"{study.title} {side}x{side}, ")
    return Table(["clean", "attacked", "certified"], rows, notes(bench, models))


def _named(study: Study) -> str:
    """Network and strategy of the models that ship."""
    network, strategy = RECIPES[study.data]
    return f"{NETWORKS[network][0]}, {strategy}"


def strategies(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Tables 3, 9 and 10: strategies against cost, by network; the paper's averages over its networks at the end."""
    return _by_strategy(bench, study, paper, ("mlp", "cnn2", "cnn4", *OURS), [*list(STRATEGIES)[:4], "Guided(10)"])


def pooling(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 6: pooled bounds. The paper's are of its 4-layer CNN; ours also of the MLP."""
    names = ["All Patch", "Pool 2", "Pool 4", "Random(1)", "Random(5)", "Random(10)", "Guided(10)"]
    if study.data == "mnist":
        return _by_strategy(bench, study, paper, ("mlp", "cnn4"), names)
    return _by_strategy(bench, study, paper, ("cnn4",), [*names[:3], "Pool 2-2", *names[3:]])


def larger(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 8: few places pay for larger networks."""
    small = _by_strategy(bench, study, paper, ("mlp", "cnn2", "cnn4"), ["All Patch"])
    names = ["All Patch", "Random(10)", "Random(20)", "Guided(10)", "Guided(20)"]
    large = _by_strategy(bench, study, paper, ("cnn5",), names)
    return Table(small.columns, small.rows + large.rows, list(dict.fromkeys(small.notes + large.notes)))


def _by_strategy(bench: Bench, study: Study, paper: Numbers, networks: Iterable[str], names: Sequence[str]) -> Table:
    rows, models = [], []
    own, shipped = RECIPES[study.data]
    for network in networks:
        tried = [] if network in OURS else names
        for name in dict.fromkeys([*tried, shipped]) if network == own else tried:
            cells: list[Cell] = []
            for side in (2, 5):
                model = trained(study.data, network, name, side)
                models.append(model)
                cells += [*accuracies(bench, model, PatchThreat(side)), hours(bench, model)]
            label = f"{name}, {NETWORKS[network][0]}"
            rows.append(Row(label, cells))
            rows += _of_paper(paper, f"{study.title}, {label}")
    rows += _of_paper(paper, f"{study.title}, mean, ")
    columns = [f"{side}x{side} {what}" for side in (2, 5) for what in ("clean", "certified", "training")]
    return Table(columns, rows, notes(bench, models))


def sparse(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 4: the MLP against any k pixels, beside randomized ablation."""
    rows, models = [], []
    for pixels in (1, 4, 10):
        model = Trained(study.data, "mlp", "sparse", pixels)
        models.append(model)
        rows.append(Row(f"k = {pixels}, IBP", [*accuracies(bench, model, SparseThreat(pixels))]))
        rows += _of_paper(paper, f"{study.title}, k = {pixels}, IBP")
        rows.append(Row(f"k = {pixels}, randomized ablation", _ablated(bench, study, pixels)))
        rows += _of_paper(paper, f"{study.title}, k = {pixels}, randomized ablation")
    more = ["randomized ablation holds with confidence 95 % for each picture; interval bounds are no statistics"]
    return Table(["clean", "certified"], rows, notes(bench, models) + more)


def _ablated(bench: Bench, study: Study, pixels: int) -> list[Cell]:
    wanted, threat = study.model("random-pixels"), SparseThreat(pixels)
    folder = bench.folder(wanted)
    if folder is None:
        return [wanted.missing()]
    right, certified = [], []
    for defense, evidence, targets in bench.evidence(folder, RandomizedAblation.name, PatchThreat(1)):
        found = defense.certificate(evidence, threat)
        right.append(found.label == targets)
        certified.append(right[-1] & found.certified)
    return [*Outcomes(torch.cat(right), torch.cat(certified)).shares()]


def sparse_networks(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 7: networks against any k pixels."""
    convolutions = ("cnn4-3",) if study.data == "mnist" else ("cnn4-11", "cnn4-13")
    rows, models = [], []
    for network in ("mlp", *convolutions):
        for pixels in (1, 4, 10):
            label = f"k = {pixels}, {NETWORKS[network][0]}"
            printed = _of_paper(paper, f"{study.title}, {label}")
            if not printed:
                continue
            model = Trained(study.data, network, "sparse", pixels)
            models.append(model)
            rows += [Row(label, [*accuracies(bench, model, SparseThreat(pixels))]), *printed]
    return Table(["clean", "certified"], rows, notes(bench, models))


def transfer(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 5: certified accuracy of models trained for squares of 4, 16, 25 pixels against other shapes of as many."""
    rows, models = [], []
    for side in (2, 4, 5):
        model = trained(study.data, *RECIPES[study.data], side)
        models.append(model)
        cells: list[Cell] = []
        for shape in SHAPES:
            if shape == "rectangle" and side == 2:
                cells.append("-")  # 4 pixels make no rectangle but the square and the line
                continue
            cells.append(accuracies(bench, model, PatchThreat(side * side, shape=shape))[1])
        rows.append(Row(f"{side * side} pixels, {_named(study)}", cells))
        rows += _of_paper(paper, f"{study.title}, {side * side} pixels")
    more = [
        "all rectangles of the least area that holds so many pixels, and lines across and down, at once: certified against "
        "the worst; the paper's networks for this table are its largest"
    ]
    return Table(list(SHAPES), rows, notes(bench, models) + more)


def _of_paper(paper: Numbers, start: str) -> list[Row]:
    """The paper's rows whose label begins so, exactly or before a name of theirs."""
    exact = {label: cells for label, cells in paper.items() if label == start or start.endswith(", ")}
    return [
        Row(label.split(", ", 1)[-1], list(cells), "paper") for label, cells in exact.items() if label.startswith(start)
    ]


def notes(bench: Bench, models: Sequence[Trained]) -> list[str]:
    """Data, and the commands that train what is not there."""
    lacking = [model for model in models if bench.folder(model.wanted) is None]
    commands = dict.fromkeys(model.command for model in lacking)
    return [
        *bench.describe(),
        "certified: interval bounds in float64 at every place, rounded outward",
        *(
            f"{NETWORKS[network][0]}: strategies other than {strategy} are trained for {COMPARED[data, network]['epochs']} epochs"
            for data, (network, strategy) in RECIPES.items()
            if (data, network) in COMPARED and any((m.data, m.network) == (data, network) for m in models)
        ),
        *(f"not run: {command}" for command in commands),
    ]
