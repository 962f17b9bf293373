"""The models of Chiang et al. 2020: their names here, what their training takes, and the command."""

from dataclasses import dataclass
from typing import final

from certipatch.reproduce.bench import Wanted
from certipatch.reproduce.studies import Study

SEEDS = (1, 2)
"""Further seeds of a model, in ``NAME-seed1`` and ``NAME-seed2``."""
NETWORKS = {
    "mlp": ("MLP(255)", {"model": "{name: mlp, widths: [255]}"}),
    "cnn2": ("2-layer CNN", {"model": "{name: cnn, depth: 2}"}),
    "cnn2-wide": ("2-layer CNN, 4 times as wide", {"model": "{name: cnn, depth: 2, widths: [16, 32, 256]}"}),
    "cnn4": ("4-layer CNN", {"model": "{name: cnn, depth: 4}"}),
    "cnn5": ("5-layer wide CNN", {"model": "{name: cnn, depth: 5}"}),
    "cnn4-3": ("Conv3x3", {"model": "{name: cnn, depth: 4, kernel: 3}"}),
    "cnn4-11": ("Conv11x11", {"model": "{name: cnn, depth: 4, kernel: 11}"}),
    "cnn4-13": ("Conv13x13", {"model": "{name: cnn, depth: 4, kernel: 13}"}),
}
# Hours on two CPU cores: of a step's CPU time on a busy machine (MNIST's MLP, in 20 epochs, and the 4-layer CNN with random
# places), else by multiply-adds from those, in the paper's number of epochs.
HOURS = {
    ("mnist", "mlp"): {"all": 0.3, "random": 0.1, "guided": 0.3, "pooled": 0.3, "sparse": 0.6, "natural": 0.1},
    ("mnist", "cnn2"): {"all": 60, "random": 1, "guided": 5},
    ("mnist", "cnn4"): {"all": 90, "random": 1, "guided": 6, "pooled": 400},
    ("mnist", "cnn4-3"): {"sparse": 10},
    ("cifar10", "mlp"): {"all": 6, "random": 1, "guided": 5, "sparse": 5},
    ("cifar10", "cnn2"): {"all": 120, "random": 2, "guided": 8},
    ("cifar10", "cnn2-wide"): {"random": 0.4},
    ("cifar10", "cnn4"): {"all": 200, "random": 2, "guided": 10, "pooled": 900},
    ("cifar10", "cnn4-11"): {"sparse": 200},
    ("cifar10", "cnn4-13"): {"sparse": 250},
    ("cifar10", "cnn5"): {"all": 6000, "random": 300, "guided": 600},
}
THEN_ALL = "Random(144), then all"
"""The strategy that looks at all places in the last fifth of the training."""
FEW = "Random(10) / Random(20)"
"""Ten places of a 2x2 patch, twenty of a larger one."""
RECIPES = {"mnist": ("mlp", THEN_ALL), "cifar10": ("cnn2-wide", FEW)}
"""Network and strategy of the recipes that ship."""
ALONE = {name: f"{name}-mlp" for name in ("mnist-ibp-5", "mnist-ibp-sparse-4")}
"""The paper's network where the model of that name is an ensemble with it."""
OURS = ("cnn2-wide",)
"""Networks that the paper has not."""
PAPER = {"cifar10": {"epochs": "200", "interval.ramp_until": "0.605", "halving": "0.05"}}
"""Of the paper's networks, where the recipe that ships has another one and another schedule."""
COMPARED = {
    ("mnist", "mlp"): {
        "epochs": "20",
        "interval.ramp_until": "0.61",
        "halving": "0.1",
        "augment.shift": "0",
        "holdout": "1000",
    }
}
"""Where strategies are compared in fewer epochs than a recipe's, all of them alike and in the paper's shares."""


@final
@dataclass(frozen=True)
class Trained:
    """A model of the paper."""

    data: str
    network: str
    strategy: str
    size: int
    """Side of the patch it is trained for; of sparse: pixels."""
    count: int | None = None
    """Places of random and guided, None for as many as the recipe has; sides of the squares that are pooled, one digit for
    each layer."""

    @property
    def base(self) -> str:
        """The recipe that it changes."""
        if self.strategy == "sparse":
            return ALONE["mnist-ibp-sparse-4"]
        name = f"{self.data}-ibp-{self.size if self.size in (2, 5) else 5}"
        return ALONE.get(name, name)

    @property
    def name(self) -> str:
        """Its folder in ``models/``, or its name in the zoo."""
        network, _ = RECIPES[self.data]
        strategy = "" if self._shipped else f"-{self.strategy}"
        count = "" if not strategy or self.count is None else f"-{self.count}"
        network = "" if self.network == network else f"-{self.network}"
        if self.strategy == "sparse":
            name = f"{self.data}-ibp-sparse-{self.size}{'' if self.network == 'mlp' else '-' + self.network}"
        else:
            name = f"{self.data}-ibp-{self.size}{strategy}{count}{network}"
        return ALONE.get(name, name)

    @property
    def _shipped(self) -> bool:
        """Whether its strategy is the recipe's."""
        return (self.strategy, self.count) == STRATEGIES[RECIPES[self.data][1]]

    @property
    def schedule(self) -> dict[str, str]:
        """Where it is not the recipe's."""
        if self.strategy == "sparse":
            return {}
        if self.network != RECIPES[self.data][0]:
            return PAPER.get(self.data, {})
        return {} if self._shipped else COMPARED.get((self.data, self.network), {})

    @property
    def wanted(self) -> Wanted:
        hours = HOURS.get((self.data, self.network), {}).get(self.strategy)
        if hours is not None and self.strategy in ("random", "guided") and self.count is not None:
            hours = round(max(0.1, hours * min(4.0, self.count / 10)), 1)
        return Wanted(self.name, self.name, hours)

    @property
    def command(self) -> str:
        """The command that trains it into ``models/``."""
        changes = {"name": self.name}
        if self.base == self.name:
            return f"certipatch train {self.name}"
        if self.strategy == "sparse":
            changes["interval.pixels"] = str(self.size)
        else:
            changes |= {"interval.strategy": self.strategy, "interval.patch": str(self.size)}
        then_all = self.count == STRATEGIES[THEN_ALL][1]
        if self.strategy == "random" and then_all != (RECIPES[self.data][1] == THEN_ALL):
            changes["interval.all_from"] = "0.8" if then_all else "1"
        changes |= self.schedule
        if self.count is not None:
            pooled = self.strategy == "pooled"
            changes["interval.pool" if pooled else "interval.places"] = (
                f"[{','.join(str(self.count))}]" if pooled else str(self.count)
            )
        if self.network != ("mlp" if self.strategy == "sparse" else RECIPES[self.data][0]):
            changes |= NETWORKS[self.network][1]
        if self.strategy == "sparse" and self.data == "cifar10":
            changes |= {"data": "cifar10", "learning_rate": "0.001", "epochs": "200"}
        quoted = (f"'{k}={v}'" if "{" in v or "[" in v else f"{k}={v}" for k, v in changes.items())
        return f"certipatch train {self.base} " + " ".join(f"--set {change}" for change in quoted)

    def seeds(self) -> list[Wanted]:
        """The same from other seeds, which are looked at where they are there."""
        return [Wanted(f"{self.name}-seed{seed}", f"{self.name}-seed{seed}") for seed in SEEDS]


STRATEGIES: dict[str, tuple[str, int | None]] = {
    "All Patch": ("all", None),
    "Random(1)": ("random", 1),
    "Random(5)": ("random", 5),
    "Random(10)": ("random", 10),
    "Random(20)": ("random", 20),
    THEN_ALL: ("random", 144),
    "Guided(10)": ("guided", 10),
    "Guided(20)": ("guided", 20),
    "Pool 2": ("pooled", 2),
    "Pool 4": ("pooled", 4),
    "Pool 2-2": ("pooled", 22),
    FEW: ("random", None),
}


def trained(data: str, network: str, strategy: str, size: int) -> Trained:
    """The model of one of the paper's strategies by its name there."""
    kind, count = STRATEGIES[strategy]
    return Trained(data, network, kind, size, count)


def _study(data: str, title: str, size: tuple[int, int]) -> Study:
    every = {
        model.name: model
        for network in NETWORKS
        for model in (
            *(trained(data, network, name, side) for name in STRATEGIES for side in (2, 4, 5)),
            *(Trained(data, network, "sparse", pixels) for pixels in (1, 4, 10)),
        )
    }
    wanted = [*(m.wanted for m in every.values()), *(w for m in every.values() for w in m.seeds())]
    ablation = Wanted("random-pixels", f"{data}-random-pixels", 11 if data == "mnist" else 500)
    return Study(data, (2, 5), (*wanted, ablation), title, size)


INTERVAL_MNIST = _study("mnist", "MNIST", (28, 28))
INTERVAL_CIFAR10 = _study("cifar10", "CIFAR-10", (32, 32))
INTERVAL = (INTERVAL_MNIST, INTERVAL_CIFAR10)
