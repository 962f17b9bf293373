"""Tables of papers as data: the YAML files of this folder, read through one schema.

A file is one paper. Its ``studies`` are data sets with models that replace the paper's, its ``attacks`` have names, and
each of its ``tables`` has rows and columns. A cell is a measurement: the entries of its column override the entries of its
row. Cells of the paper are one text per row, separated by `` | ``.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from certipatch import attacks
from certipatch.attacks.linf import step_size
from certipatch.threats import PatchThreat, SparseThreat, Threat

SEPARATOR = " | "
Half = Literal["all", "validation", "test"]
Kind = Literal["columns", "rows", "blocks", "pixels"]


class Entry(BaseModel):
    """A part of a file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strength(Entry):
    """The strength of an attack, in the words of ``certipatch attack``. starts, steps: None for the attack's own."""

    attack: str = "patch-pgd"
    starts: int | None = None
    steps: int | None = None
    step: float = 0.05
    search: str = "auto"
    adaptive: bool = True
    epsilon: float = 0.0
    """Radius of the L∞ attack; that attack has no patch."""

    @property
    def rounds(self) -> tuple[int, int]:
        """Starts and steps."""
        usual = attacks.find(self.attack)
        return (
            usual.starts if self.starts is None else self.starts,
            usual.steps if self.steps is None else self.steps,
        )

    @property
    def words(self) -> str:
        """The attack in words, for a note."""
        starts, steps = self.rounds
        knows = "" if self.adaptive else ", plain: it knows nothing of the defense"
        size = f"{step_size(1.0, steps):.2g} ε" if self.attack == "linf" else f"{self.step:.3g}"
        return f"{self.attack}, {starts} start{'s' * (starts != 1)} x {steps} steps of {size}{knows}"

    def limited_to(self, starts: int | None, steps: int | None) -> Self:
        """This attack with other starts and steps; an attack of one start, at one location, keeps its one start."""
        changes = {"starts": None if self.starts == 1 else starts, "steps": steps}
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})


class ModelSlot(Entry):
    """A model that a table needs: its role in ``--model ROLE=NAME``, its usual name, and the cost of its training."""

    role: str
    name: str
    hours: float | None = None
    """Training time on two CPU cores; None if there is no recipe."""
    work: str = "training"
    """The slow part."""
    train_command: str | None = None
    """Arguments of ``certipatch train``, N in place of ``size``; None: the recipe of its name, if there is one."""
    size: int = 0
    """Ablations: s, the width of a band or block, or k, the number of random pixels that are shown."""
    seeds: tuple["ModelSlot", ...] = ()
    """This model from other seeds; each is used if it is there."""
    views: ClassVar[Mapping[str, object] | None] = None

    @property
    def command(self) -> str:
        """The command that trains the model."""
        return f"certipatch train {self.train_command or self.name}".replace("N", str(self.size))


class Ablation(ModelSlot):
    """A model of the smoothing paper, described by its views."""

    kind: Kind
    count: int = 1
    """Bands or blocks per view."""
    stride: int = 1
    variant: str = ""
    """Training variant, if this is an additional network for the same views."""

    @property
    def hyperparameter(self) -> str:
        """Size and variant, in the paper's letters."""
        return f"{'k' if self.kind == 'pixels' else 's'} = {self.size}" + (f", {self.variant}" if self.variant else "")

    @property
    def label(self) -> str:
        """Kind of views and hyperparameter."""
        count = "" if self.count == 1 else f", {self.count} per view"
        return f"{self.kind}, {self.hyperparameter}{count}" + ("" if self.stride == 1 else f", stride {self.stride}")

    @property
    def views(self) -> dict[str, object]:  # type: ignore[override]
        """The views in the model's card."""
        if self.kind == "pixels":
            return {"name": "random-pixels", "keep": self.size}
        return {"name": self.kind, "width": self.size, "stride": self.stride, "wrap": True, "count": self.count}


class Family(Entry):
    """Ablations of one kind, by one recipe."""

    kind: Kind
    sizes: tuple[int, ...]
    hours: float
    recipe: str
    """Arguments of ``certipatch train``, without views and name."""
    shipped: int | None = None
    """The size in the recipe itself."""
    count: int = 1
    stride: int = 1

    def ablations(self, data: str) -> list[Ablation]:
        """One model for each size."""
        letter = "k" if self.kind == "pixels" else "s"
        more = {key: value for key, value in (("count", self.count), ("stride", self.stride)) if value > 1}
        suffix = "".join(f"-{key}{value}" for key, value in more.items())
        settings: dict[str, object] = {"views.keep": "N"}
        if self.kind != "pixels":
            settings = {"views.name": self.kind, "views.width": "N", **{f"views.{key}": more[key] for key in more}}
        settings["name"] = f"{data}-{self.kind}-{letter}N{suffix}"
        changed = self.recipe + "".join(f" --set {key}={value}" for key, value in settings.items())
        models = []
        for size in self.sizes:
            role, shipped = f"{self.kind}-{letter}{size}{suffix}", size == self.shipped
            models.append(
                Ablation(
                    role=role,
                    name=self.recipe if shipped else f"{data}-{role}",
                    hours=self.hours,
                    work="training" if self.hours < 5 else "training and forward passes",
                    train_command=self.recipe if shipped else changed,
                    kind=self.kind,
                    size=size,
                    count=self.count,
                    stride=self.stride,
                )
            )
        return models


class Study(Entry):
    """A data set of a paper's evaluation."""

    data: str
    title: str = ""
    """The name of the data in titles of tables."""
    image_size: tuple[int, int] | None = None
    """Images of this size with the data's classes belong to the study under any name."""
    patches: tuple[int | str, ...]
    """The patches of columns with ``{patch}`` in their title."""
    patch: int | str | None = None
    """The default patch of a cell."""
    models: tuple[ModelSlot, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _list_models(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``models`` by role, ``families`` of ablations, and ``variants`` of them, as one list."""
        values = dict(values)
        models = [ModelSlot(role=role, **fields) for role, fields in values.pop("models", {}).items()]
        for fields in values.pop("families", []):
            models += Family(**fields).ablations(values["data"])
        models += [Ablation(role=role, **fields) for role, fields in values.pop("variants", {}).items()]
        return values | {"models": tuple(models)}

    def model(self, role: str) -> ModelSlot:
        """The model in a role. KeyError if the study has none."""
        return {slot.role: slot for slot in self.models}[role]

    @property
    def ablations(self) -> tuple[Ablation, ...]:
        return tuple(slot for slot in self.models if isinstance(slot, Ablation))

    def of(self, *groups: str) -> tuple[Ablation, ...]:
        """Ablations of some kinds, one band or block each; ``variants`` are additional networks for the same views,
        ``multi-band`` show several bands or blocks per view, and ``single-band`` are the usual ones of those sizes."""
        several = [a for a in self.ablations if a.count > 1]
        sizes = {(a.kind, a.size) for a in several}
        usual = [a for a in self.ablations if a.count == 1 and not a.variant]
        named = {
            "variants": [a for a in self.ablations if a.variant],
            "multi-band": several,
            "single-band": [a for a in usual if (a.kind, a.size) in sizes],
        }
        kinds = [a for a in usual if a.kind in groups]
        return (*kinds, *(a for group in groups for a in named.get(group, [])))


def patch_words(patch: int | str) -> str:
    """The name of a patch in tables."""
    return patch if isinstance(patch, str) else f"{patch}x{patch}"


class Measurement(Entry):
    """A cell to measure."""

    measure: str = "certify"
    """A key of ``measures.MEASURES``."""
    show: str = ""
    """The name of the cell's value among values that are measured together; "" for the title of its column."""
    model: str = ""
    """Role of the model; with ``strategy`` its network."""
    strategy: str = ""
    """Interval bounds: the training strategy, as the paper names it."""
    trained_for: int | None = None
    """Interval bounds: side of the patch in training; None for the measured patch."""
    method: str | None = None
    """The defense around the model's network; None for the model's own."""
    settings: dict[str, Any] = Field(default_factory=dict)
    card_settings: tuple[str, ...] = ()
    """Settings that the model's card has."""
    aggregation: str = ""
    """A key of ``aggregation.aggregations``: local logits added up in place of a defense."""
    patch: int | str | None = None
    pixels: int | None = None
    """A number of arbitrary pixels, in place of a patch."""
    shape: str | None = None
    where: str = "anywhere"
    attack: str = ""
    """A key of the paper's ``attacks``."""
    adaptive: bool = True
    epsilon: str = ""
    """Radius of the L∞ attack, a fraction; no patch then."""
    half: Half = "all"
    """The half of the images: parameters are chosen on the first half and reported on the second."""
    not_run: str = ""
    """A text in place of a number."""

    def threat(self, study: Study) -> Threat:
        if self.pixels is not None:
            return SparseThreat(self.pixels)
        patch = study.patch if self.patch is None else self.patch
        assert patch is not None, "this table needs a patch"
        return PatchThreat(patch, shape=self.shape, where=self.where)

    def merged(self, column: "Measurement") -> Self:
        """The cell of a row and a column."""
        changes = {name: getattr(column, name) for name in column.model_fields_set}
        return self.model_copy(update=changes | {"settings": self.settings | column.settings})


class RowSpec(Measurement):
    """A row of our numbers, of the paper's, or of both; without a ``model`` only of the paper's."""

    label: str = ""
    """The template of the label: ``{name}``, ``{card}``, ``{evidence}`` of the model; ``{size}`` of receptive fields,
    ``{grid}``, ``{cells}`` of its map; ``{label}``, ``{hyperparameter}`` of ablations. If one of them is unknown, the label
    is the model's name."""
    each: tuple[str, ...] = ()
    """A row for every ablation of these groups (``Study.of``)."""
    fixed: dict[str, str] = Field(default_factory=dict)
    """Cells by column that need no measurement."""
    paper: str = ""


class TableSpec(Entry):
    """A table or figure of a paper."""

    source: str
    """Its number in the paper."""
    title: str
    make: str = "rows"
    """A key of ``MAKERS``: most tables are their rows and nothing else."""
    studies: tuple[str, ...]
    """Keys of the file's studies, the first for a call without ``--data``."""
    any_data: bool = False
    """True if the one study is used for any data."""
    all_data: bool = False
    """True if the table has the rows of all studies; other data are used if they are local."""
    images: int | dict[str, int] | None = None
    """The default number of images, from the beginning of the split."""
    columns: dict[str, Measurement]
    rows: tuple[RowSpec, ...] | dict[str, tuple[RowSpec, ...]] = ()
    """Rows for every study, or by key of the study."""
    missing: str = ""
    """Label of the one row that replaces all rows if the model is missing."""
    paper: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Rows of the paper below ours, by data."""
    paper_elsewhere: bool = False
    """True if notes show the paper's rows of other data when the paper has none of these data."""
    attacks: tuple[str, ...] = ()
    """Names of the attacks, for notes; such tables take ``--starts`` and ``--steps``."""
    notes: tuple[str, ...] = ()
    """Notes; they may name the paper's attacks, and the study's ``{patch}``."""
    model_notes: tuple[str, ...] = ()
    """Templates of a note for every model, as for labels; a note is left out if a value is unknown."""

    @model_validator(mode="before")
    @classmethod
    def _fill_columns(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Accept a list of columns; such columns do not change their rows."""
        columns = values["columns"]
        return values | {"columns": {title: {} for title in columns} if isinstance(columns, list) else columns}

    def columns_of(self, study: Study) -> dict[str, Measurement]:
        """Columns by title; those with ``{patch}`` in it once for every patch, after the others."""
        single = {title: column for title, column in self.columns.items() if "{patch}" not in title}
        for patch in study.patches:
            for title, column in self.columns.items():
                if "{patch}" in title:
                    words = title.replace("{patch}", patch_words(patch))
                    shown = column.show or title.removeprefix("{patch} ")
                    single[words] = column.model_copy(update={"patch": patch, "show": shown})
        return single

    def rows_of(self, study: str) -> tuple[RowSpec, ...]:
        """Rows for a study, by its key."""
        return self.rows.get(study, ()) if isinstance(self.rows, dict) else self.rows


class Paper(Entry):
    """A file: one paper."""

    title: str
    attacks: dict[str, Strength] = Field(default_factory=dict)
    studies: dict[str, Study]
    tables: dict[str, TableSpec]


@lru_cache
def read_paper(name: str) -> Paper:
    """Read the file ``name``.yaml of this folder; keys that begin with a dot hold shared parts."""
    text = (Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    return Paper.model_validate({key: value for key, value in values.items() if not key.startswith(".")})
