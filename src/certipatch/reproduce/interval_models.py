"""The models of Chiang et al. 2020, from ``interval_models.yaml``: names, cost of training, and commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

import yaml
from pydantic import Field

from certipatch.reproduce.schema import Entry, ModelSlot

SEEDS = (1, 2)
"""Further seeds of a model, in ``NAME-seed1`` and ``NAME-seed2``."""
ALONE = {name: f"{name}-mlp" for name in ("mnist-ibp-5", "mnist-ibp-sparse-4")}
"""The paper's network, if the model of that name is an ensemble with it."""


class Network(Entry):
    title: str
    model: str


class Strategy(Entry):
    name: str
    count: int | None = None


class Training(Entry):
    """The trainings on a data set."""

    network: str
    """Network and strategy of the shipped recipes."""
    strategy: str
    hours: dict[str, dict[str, float]]
    """By network and strategy."""
    paper: dict[str, str] = Field(default_factory=dict)
    """Schedule of the paper's networks, if the shipped recipe has another network and schedule."""
    compared: dict[str, str] = Field(default_factory=dict)
    """Schedule of the recipe's network in comparisons of strategies: fewer epochs, and the paper's shares."""
    sparse: dict[str, str] = Field(default_factory=dict)
    """Changes to the MNIST recipe against any k pixels."""


class Models(Entry):
    networks: dict[str, Network]
    strategies: dict[str, Strategy]
    data: dict[str, Training]


MODELS = Models.model_validate(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))


@final
@dataclass(frozen=True)
class IntervalModel:
    """A model of the paper."""

    data: str
    network: str
    strategy: str
    size: int
    """Side of the patch in training; for sparse, the number of pixels."""
    count: int | None = None
    """Locations of random and guided, None for the recipe's number; for pooling, the sides of the pooled squares, one digit
    per layer."""

    @property
    def training(self) -> Training:
        return MODELS.data[self.data]

    @property
    def sparse(self) -> bool:
        return self.strategy == "sparse"

    @property
    def usual_network(self) -> bool:
        """True for the network of the recipe."""
        return self.network == ("mlp" if self.sparse else self.training.network)

    @property
    def usual_strategy(self) -> bool:
        """True for the strategy of the recipe."""
        usual = MODELS.strategies[self.training.strategy]
        return (self.strategy, self.count) == (usual.name, usual.count)

    @property
    def base(self) -> str:
        """The recipe behind the model."""
        if self.sparse:
            return ALONE["mnist-ibp-sparse-4"]
        name = f"{self.data}-ibp-{self.size if self.size in (2, 5) else 5}"
        return ALONE.get(name, name)

    @property
    def name(self) -> str:
        """Its folder in ``models/``, or its name in the zoo."""
        strategy = "" if self.usual_strategy else f"-{self.strategy}"
        count = f"-{self.count}" if strategy and self.count is not None else ""
        network = "" if self.usual_network else f"-{self.network}"
        size = f"sparse-{self.size}" if self.sparse else f"{self.size}{strategy}{count}"
        name = f"{self.data}-ibp-{size}{network}"
        return ALONE.get(name, name)

    @property
    def schedule(self) -> dict[str, str]:
        """Changes to the schedule of the recipe."""
        if self.sparse:
            return {}
        if not self.usual_network:
            return self.training.paper
        return {} if self.usual_strategy else self.training.compared

    @property
    def slot(self) -> ModelSlot:
        hours = self.training.hours.get(self.network, {}).get(self.strategy)
        if hours is not None and self.strategy in ("random", "guided") and self.count is not None:
            hours = round(max(0.1, hours * min(4.0, self.count / 10)), 1)
        names = (f"{self.name}-seed{seed}" for seed in SEEDS)
        seeds = tuple(ModelSlot(role=name, name=name) for name in names)
        command = self.command.removeprefix("certipatch train ")
        return ModelSlot(role=self.name, name=self.name, hours=hours, train_command=command, seeds=seeds)

    @property
    def command(self) -> str:
        """The command that trains the model into ``models/``."""
        if self.base == self.name:
            return f"certipatch train {self.name}"
        changes = {"name": self.name}
        if self.sparse:
            changes["interval.pixels"] = str(self.size)
        else:
            changes |= {"interval.strategy": self.strategy, "interval.patch": str(self.size)}
        then_all, usual = (MODELS.strategies[name] for name in ("Random(144), then all", self.training.strategy))
        all_last = self.count == then_all.count
        if self.strategy == "random" and all_last != (usual == then_all):
            changes["interval.all_start"] = "0.8" if all_last else "1"
        changes |= self.schedule
        if self.strategy == "pooled":
            changes["interval.pool"] = f"[{','.join(str(self.count))}]"
        elif self.count is not None:
            changes["interval.sampled_locations"] = str(self.count)
        if not self.usual_network:
            changes["model"] = MODELS.networks[self.network].model
        if self.sparse:
            changes |= self.training.sparse
        quoted = (f"'{k}={v}'" if "{" in v or "[" in v else f"{k}={v}" for k, v in changes.items())
        return f"certipatch train {self.base} " + " ".join(f"--set {change}" for change in quoted)


def trained(data: str, network: str, strategy: str, size: int) -> IntervalModel:
    """The model of one of the paper's strategies by its name there, or ``sparse``."""
    entry = MODELS.strategies[strategy]
    return IntervalModel(data, network, entry.name, size, entry.count)


def slots(data: str) -> list[ModelSlot]:
    """All models of a data set, then their further seeds."""
    every = {
        model.name: model.slot
        for network in MODELS.networks
        for strategy in MODELS.strategies
        for size in ((1, 4, 10) if strategy == "sparse" else (2, 4, 5))
        for model in (trained(data, network, strategy, size),)
    }
    return [*every.values(), *(seed for slot in every.values() for seed in slot.seeds)]
