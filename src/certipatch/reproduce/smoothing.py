"""The tables of (De)Randomized Smoothing (Levine & Feizi 2020) on our models, beside the paper's numbers.

As in the paper, parameters are chosen on the first half of the pictures (validation), and the numbers come from the
other half (test).
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from certipatch.defenses import DerandomizedSmoothing, RandomizedAblation
from certipatch.errors import InputError
from certipatch.reproduce.bench import Bench, Outcomes, at_hand
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.studies import SMOOTHING, Ablation, Study
from certipatch.reproduce.table import Cell, NotRun, Row, Share, Table
from certipatch.saved import Card, read_card

DERANDOMIZED, RANDOMIZED = DerandomizedSmoothing.name, RandomizedAblation.name
THETA = 0.3
THETAS = (*(tenth / 10 for tenth in range(10)), None)  # None: votes for the top class alone
METHODS = (
    ("derandomized, θ = 0.3", DERANDOMIZED, {"threshold": THETA, "margin": "location"}),
    ("derandomized, top-1", DERANDOMIZED, {"threshold": None, "margin": "location"}),
    ("randomized columns", RANDOMIZED, {}),
)
Key = TypeVar("Key")


def halves(pictures: int) -> tuple[slice, slice]:
    """Validation half and test half: 5,000 and 5,000 of the 10,000 pictures that the paper has."""
    if pictures < 2:
        raise InputError("one picture cannot be halved into validation and test; give at least 2")
    return slice(0, pictures // 2), slice(pictures // 2, pictures)


def choose(found: Mapping[Key, Outcomes]) -> Key | None:
    """What certifies most of the validation half; on a tie the first; None where there is nothing."""
    return max(found, key=lambda key: int(_half(found[key], 0).certified.sum()), default=None)


def validation(found: Outcomes) -> Share:
    """Certified accuracy of the validation half."""
    return _half(found, 0).shares()[1]


def reported(found: Outcomes, at: str = "") -> tuple[Share, Share]:
    """Clean and certified accuracy of the test half, reached with parameters ``at``."""
    clean, certified = _half(found, 1).shares()
    return clean, Share(certified.count, certified.n, at)


def model(bench: Bench, ablation: Ablation) -> Card | NotRun:
    """The model of an ablation. InputError where it has other views than its name says."""
    folder = bench.folder(ablation.wanted)
    if folder is None:
        return ablation.wanted.missing()
    card = read_card(folder)
    views = None if card.views is None else card.views.values()
    if views != ablation.views:
        raise InputError(f"{folder}: its views are {views}, but {ablation.wanted.role} stands for {ablation.views}")
    return card


def best(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 1: the best of all bands, blocks and θ, beside the paper and Chiang et al. 2020."""
    rows: list[Row] = []
    notes: list[str] = []
    lacking: list[str] = []
    for other in SMOOTHING:
        name = f"{other.title} {other.patches[0]}x{other.patches[0]}"
        printed = paper[other.title]
        rows += [
            Row(f"{name}, Chiang et al.", [*printed[:2]], "paper"),
            Row(f"{name}, Levine & Feizi", [*printed[2:]], "paper"),
        ]
        own = bench if other is study else bench.beside(other.data) if at_hand(other.data) else None
        for words, margin in (("margin per location", "location"), ("the paper's margin", "paper")):
            cells: list[Cell] = [NotRun(f"not run (--data {other.data})")]
            if own is not None:
                found = grid(own, other, other.of("columns", "rows", "blocks"), margin)
                key = choose(found)
                if key is None:
                    cells = [next(a for a in other.of("columns") if "N" not in a.how).wanted.missing()]
                else:
                    clean, certified = reported(found[key], f"{key[0].label}, {threshold_words(key[1])}")
                    cells = [certified, clean]
            rows.append(Row(f"{name}, ours, {words}", cells))
        if own is not None:
            notes += own.describe()
            lacking += remarks(own, other.of("columns", "rows", "blocks"))
    notes += [
        "ours: parameters chosen on the first half of the pictures, among the models that were run; numbers from the other "
        "half, as in the paper",
        "ImageNet: ours are of ImageNette, ten of its classes, at 224x224; the paper's of all 1,000",
    ]
    return Table(["certified", "clean"], rows, notes + lacking)


def methods(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Table 2: derandomized with θ = 0.3, derandomized top-1, and randomized column smoothing."""
    patch, models = study.patches[0], (*study.of("columns"), *study.second)
    found: list[dict[str, Outcomes]] = [{} for _ in METHODS]
    strict: list[dict[str, Outcomes]] = [{} for _ in METHODS]
    rows = []
    for ablation in models:
        card = model(bench, ablation)
        if isinstance(card, NotRun):
            rows.append(Row(f"{ablation.at}, validation half", [card]))
            continue
        for (_, method, settings), by_size, by_size_strict in zip(METHODS, found, strict, strict=True):
            by_size[ablation.at] = run(bench, ablation, method, patch, settings)
            if method == DERANDOMIZED:
                by_size_strict[ablation.at] = run(bench, ablation, method, patch, settings | {"margin": "paper"})
        rows.append(Row(f"{ablation.at}, validation half", [validation(sizes[ablation.at]) for sizes in found]))
    rows.append(Row("best s, test half", [_chosen(sizes) for sizes in found]))
    by_paper: list[Cell] = [_chosen(sizes) for sizes in strict[:2]]
    rows.append(Row("best s by the paper's margin, test half", [*by_paper, "the same"]))
    rows.append(Row(study.title, list(paper[study.title]), "paper"))
    notes = [
        *described(bench),
        "randomized: 1,000 draws pick the class, 10,000 more bound its share with α = 0.05",
        "the paper's 53.22 and 58.08 exceed its test results (Table 1), so its Table 2 may be of the validation half",
    ]
    return Table([title for title, _, _ in METHODS], rows, notes + remarks(bench, models))


def several(bench: Bench, study: Study, paper: Numbers) -> Table:
    """Several bands or blocks per view (the paper's supplement, whose numbers are not here), beside one."""
    chosen = [
        a for a in study.of("columns", "blocks") if any(a.size == b.size and a.kind == b.kind for b in study.several)
    ]
    models, rows = (*chosen, *study.several), []
    for ablation in models:
        card = model(bench, ablation)
        if isinstance(card, NotRun):
            rows.append(Row(ablation.label, [card]))
            continue
        settings = {"threshold": THETA, "margin": "location"}
        clean, certified = _half(run(bench, ablation, DERANDOMIZED, study.patches[0], settings), 0).shares()
        rows.append(Row(ablation.label, [clean, certified]))
    notes = [*described(bench), f"validation half, θ = {THETA}, margin per location"]
    return Table(["clean", "certified"], rows, notes + remarks(bench, models))


def grid(
    bench: Bench, study: Study, models: Sequence[Ablation], margin: str = "location"
) -> dict[tuple[Ablation, float | None], Outcomes]:
    """All of s × θ of the models that are there; one pass of each serves every θ."""
    return {
        (ablation, theta): run(bench, ablation, DERANDOMIZED, study.patches[0], {"threshold": theta, "margin": margin})
        for ablation in models
        if not isinstance(model(bench, ablation), NotRun)
        for theta in THETAS
    }


def run(bench: Bench, ablation: Ablation, method: str, patch: int | str, settings: Mapping[str, object]) -> Outcomes:
    """What a method makes of the pictures with a model that is there."""
    found = bench.outcomes(ablation.wanted, method, patch, **settings)
    assert isinstance(found, Outcomes)
    return found


def threshold_words(theta: float | None) -> str:
    return "top-1" if theta is None else f"θ = {theta:.1f}"


def described(bench: Bench) -> list[str]:
    """Data and halves."""
    return [
        *bench.describe(),
        "validation: the first half of the pictures, on which parameters are chosen, among the models that were run; test: "
        "the other half; as in the paper",
    ]


def remarks(bench: Bench, models: Sequence[Ablation]) -> list[str]:
    """How the networks that are there differ from the paper's, and how to train those that are not."""
    lines: list[str] = []
    wanted: dict[str, list[Ablation]] = {}
    for ablation in models:
        card = model(bench, ablation)
        if isinstance(card, NotRun):
            wanted.setdefault(ablation.how, []).append(ablation)
        elif card.recipe.get("objective", {}).get("vote_margin"):
            lines.append(
                f"{card.name} was trained to raise the vote margin at θ = {card.settings.get('threshold', THETA)}; the "
                "paper's networks by cross entropy"
            )
    for how, those in wanted.items():
        sizes = f", N = {', '.join(str(a.size) for a in those)}" if "N" in how else ""
        lines.append(f"not run: {how}{sizes}")
    return list(dict.fromkeys(lines))


def _half(found: Outcomes, which: int) -> Outcomes:
    half = halves(len(found.right))[which]
    return Outcomes(found.right[half], found.certified[half])


def _chosen(by_size: Mapping[str, Outcomes]) -> Cell:
    key = choose(by_size)
    return NotRun("not run") if key is None else reported(by_size[key], key)[1]
