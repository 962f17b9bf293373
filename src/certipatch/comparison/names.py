"""Names of compared runs: unique, by the settings in which runs of one defense differ."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from certipatch.comparison.runs import Run, printable


def name_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs with unique names: if a defense occurs twice, its name gets the settings that differ."""
    runs = list(runs)
    for name in {run.name for run in runs}:
        group = [i for i, run in enumerate(runs) if run.name == name]
        for describe in _descriptions([runs[i] for i in group]):
            if len({runs[i].name for i in group}) == len(group):
                break
            texts = [describe(runs[i]) for i in group]
            if len(set(texts)) > 1:
                for i, text in zip(group, texts, strict=True):
                    runs[i] = dataclasses.replace(runs[i], name=printable(f"{runs[i].name}, {text}", 200))
    for i, run in enumerate(runs):
        if run.name in {other.name for other in runs[:i]}:
            runs[i] = dataclasses.replace(run, name=f"{run.name} ({i + 1})")
    return runs


def _descriptions(runs: Sequence[Run]) -> Iterator[Callable[[Run], str]]:
    """Descriptions that may differ between runs of one defense, in the order in which they are added to names."""
    yield lambda run: str(run.threat)
    yield lambda run: run.data
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        if key.startswith("settings · ") and not key.startswith("settings · threat"):
            yield lambda run, key=key: f"{key.removeprefix('settings · ')} {run.settings.get(key, '–')}"
    yield lambda run: f"seed {run.settings.get('seed', '–')}"
    yield lambda run: f"model {run.settings.get('model sha256', '–')[:8]}"
    yield lambda run: f"{run.n:,} pictures"
    yield lambda run: printable(run.folder.resolve().name)
    yield lambda run: printable(str(run.folder))
