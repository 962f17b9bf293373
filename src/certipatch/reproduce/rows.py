"""Fill a table: a row for every ``RowSpec``, a measured cell for every column, the paper's cells below ours, and notes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch

from certipatch.errors import InputError
from certipatch.models import receptive_fields
from certipatch.models.adapters import is_adapter
from certipatch.plumbing import resources
from certipatch.reproduce.attacked import target
from certipatch.reproduce.context import ReproductionContext, missing
from certipatch.reproduce.interval_models import MODELS
from certipatch.reproduce.local_logits import map_of
from certipatch.reproduce.measures import measure, slot_of
from certipatch.reproduce.schema import (
    SEPARATOR,
    Ablation,
    Measurement,
    ModelSlot,
    Paper,
    RowSpec,
    Study,
    TableSpec,
    patch_words,
)
from certipatch.reproduce.table import Cell, NotRun, Row, Table
from certipatch.saved import read_card


@final
@dataclass(frozen=True)
class Plan:
    """A table, or its part of one data set."""

    context: ReproductionContext
    paper: Paper
    spec: TableSpec
    key: str
    """The key of the study."""
    local: bool = True
    """True if the data are there; else no cell is measured."""

    @property
    def study(self) -> Study:
        return self.paper.studies[self.key]

    @cached_property
    def columns(self) -> dict[str, Measurement]:
        return self.spec.columns_of(self.study)

    @cached_property
    def rows(self) -> list[RowSpec]:
        """Rows of the study, one for each ablation of a group; rows of models that the study lacks are left out."""
        rows: list[RowSpec] = []
        for row in self.spec.rows_of(self.key):
            roles = [ablation.role for ablation in self.study.of(*row.each)] if row.each else [row.model]
            rows += [row.model_copy(update={"model": role}) for role in roles]
        known = {slot.role for slot in self.study.models}
        return [row for row in rows if not row.model or row.strategy or row.model in known]

    @property
    def slots(self) -> list[ModelSlot]:
        """The models of all cells."""
        cells = [
            row.merged(column)
            for row in self.rows
            for title, column in (self.columns or {"": Measurement()}).items()
            if row.model and title not in row.fixed
        ]
        return list(dict.fromkeys(slot_of(self.study, cell) for cell in cells if not cell.not_run))

    def cell(self, row: RowSpec, title: str) -> RowSpec:
        """The measurement of a row in a column."""
        cell = row.merged(self.columns[title])
        return cell if cell.show else cell.model_copy(update={"show": title})

    def measure(self, cell: Measurement) -> Cell:
        return measure(self.context, self.paper, self.study, cell)


def make_rows(plan: Plan) -> Table:
    """The table of a plan's rows, and the paper's rows below."""
    return Table(list(plan.columns), [*fill(plan), *paper_rows(plan)])


def fill(plan: Plan) -> list[Row]:
    """All rows of a plan. Rows of the same missing model are one row."""
    rows: list[Row] = []
    if plan.spec.missing and not any(plan.context.folder(slot) for slot in plan.slots):
        return [Row(plan.spec.missing, [missing(slot)]) for slot in plan.slots]
    for spec in plan.rows:
        rows += [row for row in fill_row(plan, spec) if rows[-1:] != [row]]
    return rows


def fill_row(plan: Plan, row: RowSpec) -> list[Row]:
    """A row of ours, if it has a model, and the paper's."""
    rows: list[Row] = []
    label = row.label
    if row.fixed and not row.model:
        rows.append(Row(label, [row.fixed[title] for title in plan.columns]))
    elif row.model:
        slot = slot_of(plan.study, row.merged(next(iter(plan.columns.values()))))
        label = (format_words(plan, row, slot) or slot.name) if plan.local else row.label
        cells: list[Cell] = [NotRun(f"not run (--data {plan.study.data})")]
        if plan.local:
            measured = {title: plan.measure(plan.cell(row, title)) for title in plan.columns if title not in row.fixed}
            cells = [(row.fixed | measured)[title] for title in plan.columns]
            reasons = set(measured.values())
            if len(reasons) == 1 and isinstance(reason := reasons.pop(), NotRun):
                cells = [reason]  # stands for all
        rows.append(Row(label, cells))
    if row.paper:
        rows.append(Row(label, list(row.paper.split(SEPARATOR)), "paper"))
    return rows


def paper_rows(plan: Plan) -> list[Row]:
    """The paper's rows for the data of a plan."""
    rows = plan.spec.paper.get(plan.study.data, {})
    return [Row(label, list(cells.split(SEPARATOR)), "paper") for label, cells in rows.items()]


def format_words(plan: Plan, row: RowSpec, slot: ModelSlot, text: str | None = None) -> str | None:
    """The row's label, or another text about its model; None if the text names an unknown fact of the model."""
    text = (row.label or "{strategy}, {network}") if text is None else text
    values = {"name": slot.name, "attack": row.attack, "aggregation": row.aggregation, "strategy": row.strategy}
    if row.strategy:
        values["network"] = MODELS.networks[row.model].title
    if isinstance(slot, Ablation):
        values |= {"label": slot.label, "hyperparameter": slot.hyperparameter}
    if plan.study.patch is not None:
        values["patch"] = patch_words(plan.study.patch)
    if (folder := plan.context.folder(slot)) is not None:
        card = read_card(folder)
        values |= {"card": card.name, "evidence": str(card.settings.get("score_type") or "logits")}
        if any(name in text for name in ("{size}", "{grid}", "{cells}")):
            values |= _describe_cells(plan, slot)
    try:
        return text.format_map(values)
    except KeyError:
        return None


def _describe_cells(plan: Plan, slot: ModelSlot) -> dict[str, str]:
    """The map of local logits in words; none without a map, or with a layer that permits no claim."""
    victim = target(plan.context, slot, None)
    assert not isinstance(victim, NotRun)
    try:
        fields = receptive_fields(map_of(victim.defense, victim.name), victim.card.image_size)
    except InputError:
        return {}
    return {
        "size": f"{fields.size[0]}x{fields.size[1]}",
        "grid": f"{fields.grid[0]}x{fields.grid[1]}",
        "cells": str(fields.number(victim.card.image_size)),
    }


def notes(plan: Plan) -> list[str]:
    """Notes on a study's models: their maps, their training, and the commands that train missing models."""
    slots = plan.slots
    described = [
        format_words(plan, row, slot_of(plan.study, row), text) for text in plan.spec.model_notes for row in plan.rows
    ]
    return [
        *(line for line in dict.fromkeys(described) if line),
        *plan.study.notes,
        *vote_margin_remarks(plan.context, slots),
        *train_commands(plan.context, slots),
    ]


def table_notes(plan: Plan) -> list[str]:
    """The notes of the file, with the attacks in words; and the paper's rows of other data if it has none of these data."""
    context, spec = plan.context, plan.spec
    values = {
        name: attack.limited_to(context.starts, context.steps).words for name, attack in plan.paper.attacks.items()
    }
    values["threads"] = str(torch.get_num_threads())
    if plan.study.patch is not None:
        values["patch"] = patch_words(plan.study.patch)
    lines = [text.format_map(values) for text in spec.notes]
    if spec.paper_elsewhere and plan.study.data not in spec.paper:
        titles = {study.data: study.title for study in plan.paper.studies.values()}
        lines += [
            f"the paper, {titles[data]}, {label}: {', '.join(cells.split(SEPARATOR))}"
            for data, rows in spec.paper.items()
            for label, cells in rows.items()
        ]
    return lines


def train_commands(context: ReproductionContext, slots: Iterable[ModelSlot]) -> list[str]:
    """The commands that train missing models; one line for all sizes of a kind."""
    sizes: dict[str, list[int]] = {}
    for slot in slots:
        if is_adapter(context.models.get(slot.role, slot.name)) or context.folder(slot) is not None:
            continue
        recipe = slot.name if resources.find("recipes", f"{slot.name}.yaml") else None
        command = slot.train_command or recipe
        line = f"not run: no recipe {slot.name}" if command is None else f"not run: certipatch train {command}"
        sizes.setdefault(line, []).append(slot.size)
    return [f"{line}, N = {', '.join(map(str, those))}" if "N" in line else line for line, those in sizes.items()]


def vote_margin_remarks(context: ReproductionContext, slots: Iterable[ModelSlot]) -> list[str]:
    """The ablations that were trained by another objective than the paper's."""
    lines = []
    for slot in slots:
        folder = context.folder(slot) if isinstance(slot, Ablation) else None
        card = None if folder is None else read_card(folder)
        if card is not None and card.recipe.get("objective", {}).get("vote_margin_weight"):
            lines.append(
                f"{card.name} was trained to raise the vote margin at θ = {card.settings.get('threshold', 0.3)}; the "
                "paper's networks by cross entropy"
            )
    return list(dict.fromkeys(lines))
