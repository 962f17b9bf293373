"""The tables of PatchGuard (Xiang et al. 2021) about attacks: undefended networks fall, other aggregations stand for longer.

The paper attacks one random place of each picture. So do we, beside an attack that looks for the place: what stands at a
random one may fall at another. The paper's networks were trained on ImageNet first; ours were not.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import inf

import numpy as np
from torch import nn

from certipatch.defenses import ClippedBagNet, Defense, PatchGuard, Undefended
from certipatch.defenses.base import ViewDefense
from certipatch.errors import InputError
from certipatch.models import receptive_fields
from certipatch.reproduce import local_logits
from certipatch.reproduce.attacked import Attacked, Strength, Target, attacked, lacking, target
from certipatch.reproduce.bench import Bench, Wanted
from certipatch.reproduce.local_logits import Aggregation
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.studies import CIFAR10, IMAGENETTE, Study
from certipatch.reproduce.table import Cell, Mean, NotRun, Row, Share, Table
from certipatch.rules import ClippedSum, Median, TrimmedMean
from certipatch.runs.records import read_records
from certipatch.threats import PatchThreat
from certipatch.views import Views

PICTURES = 1000
"""The first of the split, without ``--limit``."""
ONE_PLACE = Strength("patch-pgd", starts=1, search="random")
ATTACKS = {
    "LaVAN, one random place": Strength("lavan", starts=1, search="random"),
    "patch PGD, one random place": ONE_PLACE,
    "patch PGD, places searched": Strength("patch-pgd", starts=20),
}
PGD = {words: strength for words, strength in ATTACKS.items() if strength.attack == "patch-pgd"}
MEAN = ClippedSum(-inf, inf)
LARGEST = "3%"
"""The patch of table II and figure 3."""
LOCAL = "local logits: the last layer on every cell of the last map, which conv networks pool by maximum and BagNets by mean"


def _study(base: Study, title: str, size: tuple[int, int], patches: tuple[int | str, ...]) -> Study:
    models = tuple(wanted for wanted in base.models if wanted.role != "columns")
    return replace(base, models=models, title=title, image_size=size, patches=patches)


ATTACKED_CIFAR10 = _study(CIFAR10, "CIFAR-10", (32, 32), (2, 5))
ATTACKED_IMAGENETTE = _study(IMAGENETTE, "ImageNette", (224, 224), IMAGENETTE.patches)
ATTACKED_MNIST = Study(
    "mnist", (2, 5), (Wanted("bagnet", "mnist-bagnet", 3), Wanted("plain", "mnist-plain", 0.4)), "MNIST", (28, 28)
)
ATTACKED = (ATTACKED_CIFAR10, ATTACKED_IMAGENETTE, ATTACKED_MNIST)
COMMANDS = {
    "cifar10-bagnet10": "cifar10-bagnet --set name=cifar10-bagnet10 --set model.receptive_field=10",
    "mnist-bagnet": "cifar10-bagnet --set name=mnist-bagnet --set data=mnist --set augment.flip=false",
    "imagenette-bagnet9": "imagenette-bagnet17 --set name=imagenette-bagnet9 --set model.receptive_field=9",
    "imagenette-bagnet33": "imagenette-bagnet17 --set name=imagenette-bagnet33 --set model.receptive_field=33",
    "imagenette-plain": "cifar10-plain --set name=imagenette-plain --set data=imagenette --set holdout=469 "
    "--set 'model.widths=[32,64,128,256,384]' --set augment.shift=16 --set epochs=40 --set batch_size=64",
}
"""How models are trained that are not a recipe as it is."""


def local_predictions(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table II: every local prediction of the undefended network attacked by itself, at one random place."""
    bench, wanted, threat = bench.first(PICTURES), study.model("plain"), PatchThreat(LARGEST)
    columns = ["wrong local, attacked", "wrong local, before", "difference", "wrong global, attacked"]
    strength, found, more = ONE_PLACE.within(bench), undefended(bench, wanted), _elsewhere(paper, study)
    if isinstance(found, NotRun):
        return Table(columns, [Row(wanted.name, [found]), *_paper(paper, study)], notes(bench, {}, [wanted], more))
    network, before, after = local_logits.map_of(found.defense, found.name), [], []
    whole = attacked(bench, found, threat, strength)
    cells = receptive_fields(network, found.card.image_size).number(found.card.image_size)
    for cell in range(cells):
        alone = Undefended(local_logits.Cell(network, cell))
        one = attacked(bench, replace(found, defense=alone, name=f"{found.name}-cell{cell}"), threat, strength)
        records = read_records(one.folder)
        before.append(np.asarray(records["label"]) != np.asarray(records["target"]))
        after.append(before[-1] | np.asarray(records["broken"]))
    original, final = np.mean(before, 0), np.mean(after, 0)
    wrong = Share(whole.attacked.n - whole.attacked.count, whole.attacked.n)
    row = Row(found.card.name, [Mean.of(final), Mean.of(original), Mean.of(final - original), wrong])
    side = threat.locations(found.card.image_size).box(0)[2]
    about = [
        f"{LARGEST} patch: {side}x{side} pixels; local: mean over pictures of {cells} predictions each; "
        f"{100 - whole.clean.percent:.1f} % of the global predictions are wrong without an attack",
        LOCAL,
    ]
    return Table(columns, [row, *_paper(paper, study)], notes(bench, {"attack": strength}, [wanted], about + more))


def undefended_networks(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table IV: undefended networks, one that sees far and a BagNet, under every attack."""
    bench, models = bench.first(PICTURES), [study.model("plain"), study.model("bagnet")]
    rows = _under(
        bench, study, models, ATTACKS, lambda runs: [cell for one in runs for cell in (one.clean, one.attacked)]
    )
    columns = [f"{words} {what}" for words in study.patch_words() for what in ("clean", "attacked")]
    return Table(columns, rows + _paper(paper, study), notes(bench, ATTACKS, models, _elsewhere(paper, study)))


def receptive_field_sizes(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table VI: undefended networks by the size of their receptive fields."""
    bench, bagnets = bench.first(PICTURES), [wanted for wanted in study.models if wanted.role.startswith("bagnet")]
    models = [study.model("plain"), *bagnets]
    rows = _under(bench, study, models, PGD, lambda runs: [runs[0].clean, *(one.attacked for one in runs)])
    columns = ["clean", *(f"{words} attacked" for words in study.patch_words())]
    sizes = [line for wanted in models if (line := _field(undefended(bench, wanted)))]
    return Table(columns, rows + _paper(paper, study), notes(bench, PGD, models, sizes + _elsewhere(paper, study)))


def aggregations(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table XXI: ways to add local logits up, each under an attack that knows it; and what each certifies."""
    bench, threat = bench.first(PICTURES), PatchThreat(study.patches[1])
    models, rows = [study.model("plain"), study.model("bagnet")], []
    for wanted in models:
        found = target(bench, wanted, threat)
        if isinstance(found, NotRun):
            rows.append(Row(wanted.name, [found]))
            continue
        network, views = local_logits.network_of(found.defense, found.name)
        ways = added_up(network, views, threat, found.card.image_size)
        every = {words: _around(found, defense) for words, defense in ways.items()}
        if isinstance(found.defense, Undefended):
            every = {"its own, the maximum of features": found} | every
        for words, one in every.items():
            results = [attacked(bench, one, threat, strength) for strength in PGD.values()]
            cells: list[Cell] = [results[0].clean, *(result.attacked for result in results), results[0].certified]
            rows.append(Row(f"{found.card.name}, {words}", cells))
    more = [f"{study.patch_words()[1]} patch; u: local logits; attacks climb the aggregation itself, made soft", LOCAL]
    columns = ["clean", *(f"attacked, {words.split(', ')[1]}" for words in PGD), "certified"]
    lines = notes(bench, PGD, models, more + _elsewhere(paper, study))
    return Table(columns, rows + _paper(paper, study), lines)


def _under(
    bench: Bench,
    study: Study,
    models: Iterable[Wanted],
    ways: Mapping[str, Strength],
    shown: Callable[[list[Attacked]], list[Cell]],
) -> list[Row]:
    """A row for every undefended network and attack: what is shown of its runs against the study's patches."""
    rows: list[Row] = []
    for wanted in models:
        found = undefended(bench, wanted)
        if isinstance(found, NotRun):
            rows.append(Row(wanted.name, [found]))
            continue
        for words, strength in ways.items():
            results = [attacked(bench, found, PatchThreat(patch), strength) for patch in study.patches]
            rows.append(Row(f"{found.card.name}, {words}", shown(results)))
    return rows


def undefended(bench: Bench, wanted: Wanted) -> Target | NotRun:
    """A network without a defense: as it answers by itself, or of local logits their mean."""
    found = target(bench, wanted, None)
    if isinstance(found, NotRun) or isinstance(found.defense, Undefended):
        return found
    if isinstance(found.defense, ViewDefense):
        return _around(found, Aggregation(*local_logits.network_of(found.defense, found.name), MEAN))
    return _around(found, Undefended(found.defense.model))


def added_up(
    network: nn.Module, views: Views | None, threat: PatchThreat, image_size: tuple[int, int]
) -> dict[str, Defense]:
    """Ways to add up the local logits of a network, by their names in table XXI and ours."""
    mean = Aggregation(network, views, MEAN)
    middle = TrimmedMean(mean.number_of_views(image_size) // 4)
    return {
        "mean": mean,
        "tanh(0.05u − 1)": ClippedBagNet(network, views),
        "tanh(u)": ClippedBagNet(network, views, 1.0, 0.0),
        "clipped to (0, 15)": Aggregation(network, views, ClippedSum(0.0, 15.0)),
        "median": Aggregation(network, views, Median()),
        "mean of the middle half": Aggregation(network, views, middle),
        "robust masking": PatchGuard(network, threat, views, "logits"),
    }


def notes(bench: Bench, ways: Mapping[str, Strength], models: Iterable[Wanted], more: Iterable[str] = ()) -> list[str]:
    """Data, attacks, and the commands that train what is not there."""
    models = list(models)
    usual = [wanted for wanted in models if wanted.role not in bench.models and wanted.name in COMMANDS]
    known = [wanted for wanted in usual if bench.folder(wanted) is None]
    return [
        *bench.describe(),
        *(f"{words}: {strength.within(bench).words}" for words, strength in ways.items()),
        *more,
        *lacking(bench, [wanted for wanted in models if wanted not in known]),
        *(f"not run: certipatch train {COMMANDS[wanted.name]}" for wanted in known),
    ]


def _around(found: Target, defense: Defense) -> Target:
    return replace(found, defense=defense, name=f"{defense.name}:{found.name}")


def _field(found: Target | NotRun) -> str:
    """How far a network's cells see, in a line; empty where it has none, or a layer about which nothing can be claimed."""
    if isinstance(found, NotRun):
        return ""
    try:
        fields = receptive_fields(local_logits.map_of(found.defense, found.name), found.card.image_size)
    except InputError:
        return ""
    return f"{found.card.name}: {fields.number(found.card.image_size)} cells, receptive field {fields.size[0]}x{fields.size[1]}"


def _paper(paper: Numbers, study: Study) -> list[Row]:
    """The paper's rows for the data of a study."""
    start = f"{study.title}, "
    return [
        Row(label.removeprefix(start), list(cells), "paper")
        for label, cells in paper.items()
        if label.startswith(start)
    ]


def _elsewhere(paper: Numbers, study: Study) -> list[str]:
    """Where the paper has nothing for a study's data: what it has for the others, in lines."""
    if _paper(paper, study):
        return []
    return [f"the paper, {label}: {', '.join(cells)}" for label, cells in paper.items()]
