"""Tables 1 and 2 of Chiang et al. 2020: what attacks leave of empirical defenses, and of certified ones.

All numbers of a row are of the same pictures, so that clean ≥ attacked ≥ certified; the paper attacks 400 pictures and
certifies all.
"""

from dataclasses import replace
from typing import Any

from certipatch.defenses import DigitalWatermarking, LocalGradientsSmoothing
from certipatch.reproduce.attacked import UNCERTIFIED, Attacked, Strength, lacking, outcome
from certipatch.reproduce.bench import Bench, Wanted, at_hand
from certipatch.reproduce.interval_models import RECIPES, trained
from certipatch.reproduce.interval_papers import COMPARISON
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.studies import Study
from certipatch.reproduce.table import Cell, NotRun, Number, Row, Table
from certipatch.threats import PatchThreat

PICTURES = {"mnist": 400, "cifar10": 400, "imagenette": 100}
"""By data: how many are attacked without ``--limit``; the paper's 400, fewer photographs."""
PAPER = Strength()  # 80 x 150 steps of 0.05
PHOTOS = Strength(starts=4, steps=50)  # one start in each corner
EMPIRICAL = {"LGS": LocalGradientsSmoothing.name, "DW": DigitalWatermarking.name}
SETTINGS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("cifar10", DigitalWatermarking.name): {"share": 0.15, "neighbours": 0.3, "size": 5}
}
"""By data and defense, where the usual ones keep little under a plain attack; found on other pictures than are attacked."""


def _study(data: str, title: str, size: int, plain: Wanted, *certified: Wanted) -> Study:
    bounds = [trained(data, *RECIPES[data], side) for side in (2, 5)]
    own = [replace(model.wanted, role=f"ibp-{model.size}") for model in bounds]
    return Study(data, (2, 5), (plain, *own, *certified), title, (size, size))


MNIST = _study(
    "mnist",
    "MNIST",
    28,
    Wanted("plain", "mnist-plain", 0.4),
    Wanted("columns", "mnist-columns", 0.9),
    Wanted("votes", "mnist-columns-votes", 0.7),
)
CIFAR10 = _study(
    "cifar10", "CIFAR-10", 32, Wanted("plain", "cifar10-plain", 0.25), Wanted("columns", "cifar10-columns", 3.3)
)
PHOTOGRAPHS = Study("imagenette", (42, 52, 60), (Wanted("plain", "imagenet-lite"),), "ImageNet", (224, 224))


def empirical(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 1, and the same of MNIST and CIFAR-10: plain attacks, and those that know of the defense."""
    rows: list[Row] = []
    notes: list[str] = []
    for other in (MNIST, CIFAR10, PHOTOGRAPHS):
        own = bench if other is study else bench.beside(other.data) if at_hand(other.data) else None
        own = None if own is None else own.first(PICTURES[other.data])
        for side in other.patches:
            for defense in ("none", *EMPIRICAL):
                label = f"{other.title} {side}x{side}, {defense}"
                missing: list[Cell] = [NotRun(f"not run (--data {other.data})")]
                rows.append(Row(label, missing if own is None else _lost(own, other, int(side), defense)))
                if label in paper:
                    rows.append(Row(label, list(paper[label]), "paper"))
        if own is not None:
            notes += [*own.describe(), *lacking(own, [other.model("plain")])]
    notes += [
        f"attacks: {PAPER.within(bench).words}, anywhere; ImageNet: {PHOTOS.within(bench).words}, in the corners",
        "plain: the attack knows the network alone; adaptive: it goes through LGS itself, and through DW with the identity "
        "on the way back, as in the paper",
        "DW on CIFAR-10: share 0.15, neighbours 0.3, size 5, of 75 tried on test pictures 2,000 to 2,099",
        "ImageNet: ours are of imagenet-lite on the ten classes of ImageNette; the paper's of VGG19 and Inception V3 on "
        "ImageNet; its MNIST and CIFAR-10 are of its Table 2, where they are not missing",
    ]
    return Table(["clean", "plain attack", "adaptive attack", "points lost"], rows, notes)


def certified(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 2: attacked accuracy of empirical and of certified defenses, beside their certificates."""
    bench = bench.first(PICTURES[study.data])
    rows: list[Row] = []
    plain, first, second, *others = study.models
    bounds = dict(zip(study.patches, (first, second), strict=True))
    for side in study.patches:
        asked: list[tuple[str, Wanted, str | None, bool]] = [("IFGSM, none", plain, None, True)]
        for name, method in EMPIRICAL.items():
            asked += [(f"IFGSM, {name}", plain, method, False), (f"IFGSM + {name}, {name}", plain, method, True)]
        asked += [("IFGSM, IBP", bounds[side], None, True)]
        asked += [(f"IFGSM, {wanted.name}", wanted, None, True) for wanted in others]
        for words, wanted, method, adaptive in asked:
            label = f"{study.title} {side}x{side}, {words}"
            strength, settings = replace(PAPER, adaptive=adaptive), _settings(study, method)
            found = outcome(bench, wanted, PatchThreat(int(side)), strength, method, **settings)
            rows.append(Row(label, [found] if isinstance(found, NotRun) else list(found.cells)))
            if label in paper:
                rows.append(Row(label, list(paper[label]), "paper"))
    notes = [
        *bench.describe(),
        f"attacks: {PAPER.within(bench).words}, anywhere; certified pictures are attacked too, through the defense; IFGSM "
        "against LGS or DW knows the network alone",
        "the paper's numbers are means of three models, clean and certified of all test pictures, attacked of 400; ours of "
        "one model and the same pictures (all: certipatch reproduce ibp-table2)",
    ]
    return Table(["clean", "attacked", "certified"], rows, notes + lacking(bench, study.models))


def _lost(bench: Bench, study: Study, side: int, defense: str) -> list[Cell]:
    """Clean accuracy, that under a plain and under an adaptive attack, and the points lost to being known."""
    corners = study is PHOTOGRAPHS
    threat, strength = PatchThreat(side, where="corners" if corners else "anywhere"), PHOTOS if corners else PAPER
    wanted, method = study.model("plain"), EMPIRICAL.get(defense)
    settings = _settings(study, method)
    adaptive = outcome(bench, wanted, threat, strength, method, **settings)
    if isinstance(adaptive, NotRun):
        return [adaptive]
    if method is None:
        return [adaptive.clean, adaptive.attacked, "the same", UNCERTIFIED]
    plain = outcome(bench, wanted, threat, replace(strength, adaptive=False), method, **settings)
    assert isinstance(plain, Attacked)
    lost = Number(plain.attacked.percent - adaptive.attacked.percent)
    return [plain.clean, plain.attacked, adaptive.attacked, lost]


def _settings(study: Study, method: str | None) -> dict[str, Any]:
    return SETTINGS.get((study.data, method), {})


def _of_table2() -> Numbers:
    """What the paper's Table 2 has of empirical defenses: clean, plain and adaptive attack."""
    found: Numbers = {}
    for label, (clean, plain, _) in COMPARISON.items():
        place, _, defense = label.split(", ")
        if label == f"{place}, IFGSM, {defense}" and defense != "IBP":
            adaptive = COMPARISON.get(f"{place}, IFGSM + {defense}, {defense}")
            found[f"{place}, {defense}"] = (clean, plain, "the same" if adaptive is None else adaptive[1])
    return found


EMPIRICAL_PAPER: Numbers = _of_table2() | {  # Table 1
    "ImageNet 42x42, LGS": (UNCERTIFIED, "78", "14"),
    "ImageNet 52x52, LGS": (UNCERTIFIED, "75", "5"),
    "ImageNet 60x60, LGS": (UNCERTIFIED, "71", "3"),
    "ImageNet 42x42, DW": (UNCERTIFIED, "56", "13"),
    "ImageNet 52x52, DW": (UNCERTIFIED, "49", "8"),
    "ImageNet 60x60, DW": (UNCERTIFIED, "45", "5"),
}
