"""Tables and figures of the papers, ours beside theirs: one command each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from certipatch.data import Pictures, load
from certipatch.data.known import KNOWN, canonical, dataset_names, known_classes
from certipatch.errors import InputError, unknown
from certipatch.reproduce import interval_models, smoothing
from certipatch.reproduce.context import ReproductionContext, is_local
from certipatch.reproduce.field_figure import receptive_field_figure
from certipatch.reproduce.local_histograms import draw_histograms
from certipatch.reproduce.local_predictions import attack_every_cell
from certipatch.reproduce.rows import Plan, make_rows, notes, table_notes
from certipatch.reproduce.schema import Paper, Study, TableSpec, read_paper
from certipatch.reproduce.table import Table

__all__ = ["TABLES", "Reproduction", "ReproductionContext", "Table", "find", "run"]

MAKERS: dict[str, Callable[[Plan], Table]] = {
    "rows": make_rows,
    "local predictions": attack_every_cell,
    "local histograms": draw_histograms,
    "receptive field": receptive_field_figure,
    "clean and certified": smoothing.clean_and_certified,
    "single views": smoothing.single_views,
    "thresholds": smoothing.thresholds,
    "patch sizes": smoothing.patch_sizes,
    "attack curves": smoothing.attack_curves,
    "best of each method": smoothing.best_of_each_method,
    "methods": smoothing.methods,
}


@final
@dataclass(frozen=True)
class Reproduction:
    """A table or figure of a paper."""

    paper: Paper
    spec: TableSpec

    @property
    def studies(self) -> dict[str, Study]:
        """The table's data sets by key; the first is the default of ``--data``."""
        return {key: self.paper.studies[key] for key in self.spec.studies}

    @property
    def default_data(self) -> str:
        return next(iter(self.studies.values())).data

    @property
    def full_title(self) -> str:
        return f"{self.paper.title}, {self.spec.source}: {self.spec.title}"

    def plan(self, key: str, context: ReproductionContext, local: bool = True) -> Plan:
        """The table of one data set, on its own number of images unless there is a limit."""
        images, data = self.spec.images, self.paper.studies[key].data
        number = images[data] if isinstance(images, dict) else images
        return Plan(context if number is None else context.limited_to(number), self.paper, self.spec, key, local)


TABLES: dict[str, Reproduction] = {
    name: Reproduction(paper, spec)
    for paper in map(read_paper, ("patchguard", "smoothing", "interval"))
    for name, spec in paper.tables.items()
}
ATTACKING = frozenset(name for name, table in TABLES.items() if table.spec.attacks)
"""The tables with attacks; these take ``--starts`` and ``--steps``."""


def find(name: str) -> Reproduction:
    """A table by name. InputError with the nearest name."""
    if name in TABLES:
        return TABLES[name]
    raise unknown("table", name, TABLES)


def find_study(pictures: Pictures, studies: dict[str, Study]) -> str:
    """The key of the study that images belong to: by their name, else by classes and size. InputError if none does."""
    by_name = {study.data: key for key, study in studies.items()}
    name = canonical(pictures.name)
    if name in by_name:
        return by_name[name]
    if name not in dataset_names() and name not in KNOWN:
        size = pictures.pixels([0]).shape[1:3]
        for key, study in studies.items():
            if pictures.class_names == known_classes(study.data) and size == study.image_size:
                return key
    raise InputError(
        f"this table is made for {' or '.join(by_name)}, not for {pictures.name}; give one of them by --data"
    )


def run(name: str, context: ReproductionContext) -> Table:
    """Make a table. InputError on data or models that do not fit."""
    table = find(name)
    spec, studies = table.spec, table.studies
    if not spec.attacks and (context.starts is not None or context.steps is not None):
        raise InputError(f"{name} attacks nothing; leave --starts and --steps out")
    key = next(iter(studies))
    if not spec.any_data:
        key = find_study(load(context.data, context.split, limit=context.limit), studies)
    plan = table.plan(key, context)
    _check_roles(name, plan)
    plans = [plan]
    if spec.all_data:
        others = {other: studies[other].data for other in studies if other != key}
        rest = {other: table.plan(other, context.for_dataset(data), is_local(data)) for other, data in others.items()}
        plans = [({key: plan} | rest)[each] for each in studies]
    parts = [MAKERS[spec.make](each) for each in plans]
    own = [
        [*each.context.describe(), *part.notes, *notes(each)]
        for each, part in zip(plans, parts, strict=True)
        if each.local
    ]
    every = dict.fromkeys([line for lines in own for line in lines] + table_notes(plan))
    title = plan.study.title
    return replace(
        parts[0],
        rows=[row for part in parts for row in part.rows],
        notes=list(every),
        name=name,
        title=table.full_title + (f" ({title})" if title else ""),
    )


def _check_roles(name: str, plan: Plan) -> None:
    """Refuse a model in a role that the table does not have."""
    slots = list(plan.study.models)
    if any(row.strategy for row in plan.rows):
        slots = [*interval_models.slots(plan.study.data), *slots]
    roles = [slot.role for slot in slots]
    for role in plan.context.models:
        if role not in roles:
            raise InputError(f"{name} has no model {role!r}; its roles are {', '.join(roles)}")
