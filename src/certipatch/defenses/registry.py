"""The defenses by name. A new one is a file of its own and a line in ``OWN``, or an entry point of another package.

A package registers its defense in its ``pyproject.toml``::

    [project.entry-points."certipatch.defenses"]
    borda = "own_defense:Borda"

Nothing is imported before a defense is asked for by name. Our own names come first: no package can replace them.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, final

from certipatch.errors import InputError

if TYPE_CHECKING:
    from certipatch.defenses.method import Method

GROUP = "certipatch.defenses"
OWN = {
    "derandomized-smoothing": "derandomized_smoothing:DerandomizedSmoothing",
    "randomized-ablation": "randomized_ablation:RandomizedAblation",
    "patchguard": "patchguard:PatchGuard",
    "clipped-bagnet": "clipped_bagnet:ClippedBagNet",
    "bagcert": "bagcert:BagCert",
    "patchguard-plus-plus": "patchguard_plus_plus:PatchGuardPlusPlus",
    "interval-bounds": "interval_bounds:IntervalBounds",
    "patchcleanser": "patchcleanser:PatchCleanser",
    "patchcure": "patchcure:PatchCURE",
    "minority-reports": "minority_reports:MinorityReports",
    "undefended": "undefended:Undefended",
    "lgs": "local_gradients_smoothing:LocalGradientsSmoothing",
    "dw": "digital_watermarking:DigitalWatermarking",
}
CLASSES = {place.partition(":")[2]: name for name, place in OWN.items()}
"""Our own defenses by the names of their classes."""


@final
class Registry(Mapping[str, "type[Method]"]):
    """Name → class of every defense, our own and those of other packages. Looking one up imports it.

    Errors: KeyError for an unknown name, InputError for a defense of another package that cannot be used.
    """

    def __getitem__(self, name: str) -> "type[Method]":
        if name in OWN:
            module, _, attribute = OWN[name].partition(":")
            return getattr(import_module(f"certipatch.defenses.{module}"), attribute)
        for entry in entry_points(group=GROUP, name=name):
            return load_foreign(entry)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in OWN or (isinstance(name, str) and bool(entry_points(group=GROUP, name=name)))

    def __iter__(self) -> Iterator[str]:
        return iter([*OWN, *sorted({entry.name for entry in entry_points(group=GROUP)} - set(OWN))])

    def __len__(self) -> int:
        return len(list(iter(self)))


METHODS = Registry()


def load_foreign(entry: EntryPoint) -> "type[Method]":
    """The defense of another package. InputError if it cannot be imported, or is no defense of that name."""
    from certipatch.defenses.method import Method

    try:
        loaded = entry.load()
    except Exception as error:  # whatever the other package raises on import
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(f"the defense {entry.name} ({entry.value}) cannot be imported: {reason}") from None
    if not (isinstance(loaded, type) and issubclass(loaded, Method) and getattr(loaded, "name", None) == entry.name):
        raise InputError(
            f"{entry.value}, which a package registers as the defense {entry.name}, is not a subclass of "
            f"certipatch.Defense with the name {entry.name!r}"
        )
    return loaded


def names_with(flag: str) -> str:
    """The names of the defenses whose class attribute ``flag`` is true, without those that cannot be imported."""
    names = []
    for name in METHODS:
        with suppress(InputError):
            names += [name] if getattr(METHODS[name], flag) else []
    return ", ".join(names)
