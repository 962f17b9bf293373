"""Tables and figures of the papers, ours beside theirs: one command each."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from certipatch.data import load
from certipatch.errors import InputError
from certipatch.reproduce import (
    attacked_interval,
    attacked_smoothing,
    interval,
    interval_papers,
    papers,
    patchguard,
    patchguard_attacks,
    smoothing,
    smoothing_figures,
)
from certipatch.reproduce.bench import Bench
from certipatch.reproduce.fields import receptive_field_figure
from certipatch.reproduce.interval_models import INTERVAL
from certipatch.reproduce.local_histograms import histograms
from certipatch.reproduce.papers import Numbers
from certipatch.reproduce.studies import CIFAR10, IMAGENETTE, SMOOTHING, Study, study_of
from certipatch.reproduce.table import Table

__all__ = ["TABLES", "Bench", "Reproduction", "Table", "find", "run"]


@final
@dataclass(frozen=True)
class Reproduction:
    """A table or figure of a paper: how to make it, for which study, and what the paper has."""

    make: Callable[[Bench, Study, Numbers], Table]
    study: Study
    paper: Numbers
    source: str
    title: str
    studies: tuple[Study, ...] = ()
    """Where the data say which study it is: these; ``study`` is the one without ``--data``."""


def _pg(
    number: str, title: str, make: Callable[[Bench, Study, Numbers], Table], study: Study, paper: Numbers
) -> Reproduction:
    return Reproduction(make, study, paper, f"PatchGuard, {number}", title)


def _attacked(
    number: str, title: str, make: Callable[[Bench, Study, Numbers], Table], paper: Numbers | None = None
) -> Reproduction:
    studies = patchguard_attacks.ATTACKED
    return Reproduction(make, studies[0], paper or {}, f"PatchGuard, {number}", title, studies)


def _ds(
    number: str,
    title: str,
    make: Callable[[Bench, Study, Numbers], Table],
    paper: Numbers | None = None,
    studies: tuple[Study, ...] = SMOOTHING[:2],
) -> Reproduction:
    return Reproduction(make, studies[0], paper or {}, f"(De)Randomized Smoothing, {number}", title, studies)


def _ibp(
    number: str,
    title: str,
    make: Callable[[Bench, Study, Numbers], Table],
    paper: Numbers,
    studies: tuple[Study, ...] = INTERVAL,
) -> Reproduction:
    return Reproduction(make, studies[0], paper, f"Certified Defenses for Patches, {number}", title, studies)


TABLES: dict[str, Reproduction] = {
    "pg-table2": _attacked(
        "Table II", "attacked local predictions", patchguard_attacks.local_predictions, papers.LOCAL_PREDICTIONS
    ),
    "pg-table3": _pg("Table III", "default parameters", patchguard.parameters, CIFAR10, papers.PARAMETERS),
    "pg-table4": _attacked(
        "Table IV", "undefended networks under attack", patchguard_attacks.undefended_networks, papers.UNDEFENDED
    ),
    "pg-table5": _pg(
        "Table V, CIFAR-10",
        "clean and certified accuracy of all defenses",
        patchguard.comparison,
        CIFAR10,
        papers.COMPARISON_CIFAR10,
    ),
    "pg-table5-imagenette": _pg(
        "Table V, ImageNette",
        "clean and certified accuracy of all defenses",
        patchguard.comparison,
        IMAGENETTE,
        papers.COMPARISON_IMAGENETTE,
    ),
    "pg-table6": _attacked(
        "Table VI",
        "undefended networks by receptive field",
        patchguard_attacks.receptive_field_sizes,
        papers.UNDEFENDED_FIELDS,
    ),
    "pg-table7": _pg(
        "Table VII",
        "invariance of the prediction to masked windows",
        patchguard.invariance,
        IMAGENETTE,
        papers.INVARIANCE_IMAGENETTE,
    ),
    "pg-table8": _pg(
        "Table VIII",
        "clipped local logits without a defense",
        patchguard.clipping,
        IMAGENETTE,
        papers.CLIPPING_IMAGENETTE,
    ),
    "pg-table9": _pg(
        "Table IX",
        "size of the receptive field",
        patchguard.receptive_field_sizes,
        IMAGENETTE,
        papers.FIELDS_IMAGENETTE,
    ),
    "pg-table10": _pg(
        "Table X",
        "detection threshold and causes of failure",
        patchguard.thresholds,
        IMAGENETTE,
        papers.THRESHOLDS_IMAGENETTE,
    ),
    "pg-table11": _pg(
        "Table XI", "evidence of a BagNet", patchguard.evidence_of_bagnet, IMAGENETTE, papers.BAGNET_EVIDENCE_IMAGENETTE
    ),
    "pg-table12": _pg(
        "Table XII",
        "evidence of column bands",
        patchguard.evidence_of_bands,
        IMAGENETTE,
        papers.BAND_EVIDENCE_IMAGENETTE,
    ),
    "pg-table13": _pg("Table XIII", "inference time", patchguard.inference_time, IMAGENETTE, papers.TIME_IMAGENETTE),
    "pg-table14": _pg(
        "Table XIV",
        "invariance of the prediction to masked windows",
        patchguard.invariance,
        CIFAR10,
        papers.INVARIANCE_CIFAR10,
    ),
    "pg-table15": _pg(
        "Table XV", "clipped local logits without a defense", patchguard.clipping, CIFAR10, papers.CLIPPING_CIFAR10
    ),
    "pg-table16": _pg(
        "Table XVI", "size of the receptive field", patchguard.receptive_field_sizes, CIFAR10, papers.FIELDS_CIFAR10
    ),
    "pg-table17": _pg(
        "Table XVII",
        "detection threshold and causes of failure",
        patchguard.thresholds,
        CIFAR10,
        papers.THRESHOLDS_CIFAR10,
    ),
    "pg-table18": _pg(
        "Table XVIII", "evidence of a BagNet", patchguard.evidence_of_bagnet, CIFAR10, papers.BAGNET_EVIDENCE_CIFAR10
    ),
    "pg-table19": _pg(
        "Table XIX", "evidence of column bands", patchguard.evidence_of_bands, CIFAR10, papers.BAND_EVIDENCE_CIFAR10
    ),
    "pg-table20": _pg("Table XX", "inference time", patchguard.inference_time, CIFAR10, papers.TIME_CIFAR10),
    "pg-table21": _attacked(
        "Table XXI", "other aggregations under attack", patchguard_attacks.aggregations, papers.AGGREGATIONS
    ),
    "pg-fig3": _attacked("Figures 3, 5, 6", "largest local logits, clean and attacked", histograms),
    "pg-fig7": _pg("Figure 7", "attention within a receptive field", receptive_field_figure, CIFAR10, {}),
    "ds-fig1": _ds("Figure 1", "clean against certified accuracy", smoothing_figures.clean_and_certified),
    "ds-fig3": _ds("Figure 3", "accuracy of single views against Δ", smoothing_figures.single_views),
    "ds-fig5": _ds("Figure 5", "width and threshold", smoothing_figures.thresholds, papers.SMOOTHING_CHOICE),
    "ds-fig6": _ds("Figure 6", "size of the patch", smoothing_figures.patch_sizes),
    "ds-fig7": _ds(
        "Figure 7",
        "smoothing and an undefended network under attack",
        attacked_smoothing.attacks,
        studies=attacked_smoothing.STUDIES,
    ),
    "ds-table1": _ds("Table 1", "the best of each method", smoothing.best, papers.SMOOTHING_BEST, SMOOTHING),
    "ds-table2": _ds("Table 2", "derandomized and randomized columns", smoothing.methods, papers.SMOOTHING_METHODS),
    "ibp-table1": _ibp(
        "Table 1",
        "empirical defenses under attack",
        attacked_interval.empirical,
        attacked_interval.EMPIRICAL_PAPER,
        (attacked_interval.MNIST, attacked_interval.CIFAR10, attacked_interval.PHOTOGRAPHS),
    ),
    "ibp-table2-attacked": _ibp(
        "Table 2, attacked",
        "attacks beside certificates",
        attacked_interval.certified,
        interval_papers.COMPARISON,
        (attacked_interval.MNIST, attacked_interval.CIFAR10),
    ),
    "ibp-table2": _ibp("Table 2", "beside other defenses", interval.comparison, interval_papers.COMPARISON),
    "ibp-table3": _ibp("Tables 3, 9, 10", "strategies and their cost", interval.strategies, interval_papers.STRATEGIES),
    "ibp-table4": _ibp("Table 4", "any k pixels", interval.sparse, interval_papers.SPARSE),
    "ibp-table5": _ibp("Table 5", "transfer to other shapes", interval.transfer, interval_papers.TRANSFER),
    "ibp-table6": _ibp("Table 6", "pooled bounds", interval.pooling, interval_papers.POOLING),
    "ibp-table7": _ibp(
        "Table 7", "any k pixels, by network", interval.sparse_networks, interval_papers.SPARSE_NETWORKS
    ),
    "ibp-table8": _ibp("Table 8", "larger networks", interval.larger, interval_papers.LARGER, INTERVAL[1:]),
    "ds-several": _ds("supplement", "several bands or blocks per view", smoothing.several),
}
ATTACKING = frozenset({"ds-fig7", "ibp-table1", "ibp-table2-attacked"}) | {
    name for name, found in TABLES.items() if found.studies == patchguard_attacks.ATTACKED
}
"""The tables that attack, and so take ``--starts`` and ``--steps``."""


def find(name: str) -> Reproduction:
    """A table by name. InputError with the nearest name."""
    if name in TABLES:
        return TABLES[name]
    near = difflib.get_close_matches(name, TABLES, n=1)
    raise InputError(
        f"there is no table {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TABLES)}")
    )


def run(name: str, bench: Bench) -> Table:
    """Make a table. InputError on data or models that do not fit."""
    asked = find(name)
    if name not in ATTACKING and (bench.starts is not None or bench.steps is not None):
        raise InputError(f"{name} attacks nothing; leave --starts and --steps out")
    study = asked.study
    if asked.studies:
        study = study_of(load(bench.data, bench.split, limit=bench.limit), asked.studies)
    for role in bench.models:
        roles = [wanted.role for wanted in study.models]
        if role not in roles:
            raise InputError(f"{name} has no model {role!r}; its roles are {', '.join(roles)}")
    table = asked.make(bench, study, asked.paper)
    about = f"{asked.source}: {asked.title}" + (f" ({study.title})" if study.title else "")
    return replace(table, name=name, title=about)
