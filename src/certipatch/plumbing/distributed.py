"""The processes of one torchrun job: the rank of this process, and small messages between them. Torch is imported late.

Every wait for a process that may be dead has a limit. Workers exchange values through torchrun's own key value store,
which outlives them, and not through collective operations.
"""

import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

from certipatch.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

CONNECT = timedelta(seconds=30)
WAIT = timedelta(hours=2)  # for the first worker's values; torchrun ends the others sooner if that worker dies
_MARK = "TORCHELASTIC_RUN_ID"  # set by torchrun, as Fabric tells too


def rank() -> int:
    """The number of this process in its torchrun job, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if _MARK in os.environ else 0


def count() -> int:
    """The number of processes in this torchrun job, on all hosts; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _MARK in os.environ else 1


@final
class Workers:
    """The workers of a job, from the view of one worker; without arguments a single process.

    Args:
        rank, count: its number, and the number of workers.
        store: their shared key value store; None only for a single process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: "Store | None" = None):
        if not 0 <= rank < count or (count > 1 and store is None):
            raise ValueError(f"worker {rank} of {count} {'with' if store else 'without'} a store")
        self.rank, self.count, self._store = rank, count, store
        self._shared = 0

    @property
    def first(self) -> bool:
        """True for the worker that prepares, merges, shows and writes the common results."""
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """The value of ``make`` in the first worker, for all workers: plain JSON. Every worker calls this equally often.

        Errors: InputError and OSError of ``make`` in the first worker, InputError with the same words in the others.
        """
        if self._store is None:
            return make()
        self._shared += 1
        key = f"shared/{self._shared}"
        if not self.first:
            try:
                answer = json.loads(self._store.get(key))
            except RuntimeError as error:  # torch.distributed.DistError
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"the first worker does not answer ({reason}); start again") from None
            if "error" in answer:
                raise InputError(answer["error"])
            return answer["value"]
        try:
            value = make()
        except (InputError, OSError) as error:
            self._store.set(key, json.dumps({"error": str(error)}))
            raise
        self._store.set(key, json.dumps({"value": value}))
        return value

    def tickets(self, number: int) -> Iterator[int]:
        """Some of the numbers 0 … number−1; each number goes to the first worker that takes it."""
        if self._store is None:
            yield from range(number)
            return
        while (ticket := self._store.add("ticket", 1) - 1) < number:
            yield ticket

    def claim_error_report(self) -> bool:
        """Return True if this worker asks first. Several workers meet an error, but one line is enough."""
        return self._store is None or self._store.add("said", 1) == 1


def join(name: str, connect: timedelta = CONNECT) -> Workers:
    """This process among those that torchrun started; alone without torchrun.

    ``name`` is the same for all workers, and new for each task: the store keeps the keys of earlier tasks.
    """
    return Workers(rank(), count(), shared_store(name, connect) if count() > 1 else None)


def shared_store(name: str, connect: timedelta = CONNECT) -> "Store":
    """torchrun's key value store, under keys that no other ``name`` and no earlier attempt has used."""
    from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

    store, _, _ = next(iter(rendezvous("env://", timeout=connect)))
    store.set_timeout(WAIT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"certipatch/{attempt}/{name}", store)


def should_report_error() -> bool:
    """Return True if this process shall report an error: the first process that asks reports it."""
    if count() == 1:
        return True
    try:
        return join("errors", timedelta(seconds=5)).claim_error_report()
    except (OSError, RuntimeError, ValueError):  # no store answers: two reports are better than none
        return True
