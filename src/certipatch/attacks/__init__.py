"""Attacks that paint patches, adaptive to each defense; every one is decided by the defense's own answer."""

from certipatch.attacks.base import Answer, Attack, Outcome, Task, Victim, certifies
from certipatch.attacks.lavan import LaVAN
from certipatch.attacks.linf import LInf
from certipatch.attacks.patch_pgd import PatchPGD
from certipatch.attacks.places import Places
from certipatch.attacks.sparse import Sparse
from certipatch.attacks.square import Square
from certipatch.attacks.universal import Universal
from certipatch.errors import unknown

__all__ = [
    "ATTACKS",
    "Answer",
    "Attack",
    "LInf",
    "LaVAN",
    "Outcome",
    "PatchPGD",
    "Places",
    "Sparse",
    "Square",
    "Task",
    "Universal",
    "Victim",
    "certifies",
    "find",
]

ATTACKS: dict[str, Attack] = {
    attack.name: attack for attack in (PatchPGD(), LaVAN(), Universal(), Square(), Sparse(), LInf())
}


def find(name: str) -> Attack:
    """An attack by name. InputError with the nearest name."""
    if name in ATTACKS:
        return ATTACKS[name]
    raise unknown("attack", name, ATTACKS)
