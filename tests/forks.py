"""Real processes that can be killed, for the price of a fork: a server imports everything once and forks each command.

A test asks for commands to run side by side; each is its own process with its own standard streams, environment and
fault: killed at a moment, killed at or refused its n-th file operation, without room for large files, or bound by file modes.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

WARM = ("lightning.fabric", "scipy.stats", "certipatch.cli.progress", "certipatch.data.parquet",
        "certipatch.runs.evaluate", "certipatch.training.train")  # fmt: skip  # what the commands import


@dataclass(frozen=True)
class Command:
    """``certipatch`` with some arguments, and what shall happen to it."""

    arguments: list[str]
    kill_after: float | None = None  # seconds
    folder: str | None = None  # file operations below it are counted
    kill_at: int | None = None  # the number of the operation before which the process is killed
    full_from: int | None = None  # from this operation on there is no space left on the device
    largest_file: int | None = None  # bytes
    bound_by_modes: bool = False  # root, too, may write only what the files' modes allow
    change: dict[str, Any] = field(default_factory=dict)  # module.attribute: value, or the text of a lambda


@dataclass(frozen=True)
class Ended:
    """How a command ended; a negative code is the signal."""

    code: int
    out: str
    err: str
    seconds: float
    operations: int


class Forks:
    """The server, as tests see it."""

    def __init__(self) -> None:
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | single,
        )

    def run(self, *commands: Command, workers: bool = False) -> list[Ended]:
        """Run commands side by side; as ``workers`` they are the processes of one torchrun job, which ends the others
        once one has failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"commands": [asdict(command) for command in commands], "workers": workers}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._process.stdout.readline())]

    def one(self, *arguments: object, **faults: Any) -> Ended:
        """Run one command."""
        return self.run(Command([str(argument) for argument in arguments], **faults))[0]

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


def serve() -> None:
    """Read requests, fork, answer."""
    import torch

    for name in WARM:
        import_module(name)
    from certipatch.report import document

    document._template = cache(document._template)  # its compilation takes half of a small run
    document._template()
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(_side_by_side(request["commands"], request["workers"], Path(folder))), flush=True)


def _side_by_side(commands: list[dict], workers: bool, folder: Path) -> list[dict]:
    port, keeper = _store() if workers else (0, None)
    started, running, ended = time.monotonic(), {}, {}
    for rank, command in enumerate(commands):
        environment = _torchrun(rank, len(commands), port) if workers else {}
        pid = os.fork()
        if pid == 0:
            _become(command, environment, folder / str(rank))
        running[pid] = rank
    failed = None
    while running:
        time.sleep(0.002)
        for pid, rank in list(running.items()):
            now, moment = time.monotonic(), commands[rank]["kill_after"]
            if (moment is not None and now - started > moment) or (failed is not None and now - failed > 1):
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                ended[rank] = (os.waitstatus_to_exitcode(status), now - started)
                if workers and ended[rank][0] != 0 and failed is None:
                    failed = now
    if keeper is not None:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
    answer = []
    for rank in range(len(commands)):
        out, err, count = (folder / f"{rank}.{kind}" for kind in ("out", "err", "count"))
        answer.append(
            {
                "code": ended[rank][0],
                "out": out.read_text(),
                "err": err.read_text(),
                "seconds": ended[rank][1],
                "operations": int(count.read_text()) if count.exists() else -1,
            }
        )
    return answer


def _store() -> tuple[int, int]:
    """The key value store that torchrun's agent keeps, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        while store:
            time.sleep(60)
    return port, pid


def _torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    return {name: str(value) for name, value in values.items()}


def _become(command: dict, environment: dict[str, str], files: Path) -> None:
    """The child: run the command and end."""
    code = 70
    try:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(files.with_suffix(f".{kind}"), os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(environment)
        operations = _count_operations(command) if command["folder"] else [-1]
        for name, value in command["change"].items():
            module, _, attribute = name.rpartition(".")
            setattr(import_module(module), attribute, eval(value) if str(value).startswith("lambda") else value)
        if command["largest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (command["largest_file"],) * 2)
        if command["bound_by_modes"] and os.geteuid() == 0:
            _obey_modes()
        sys.argv = ["certipatch", *command["arguments"]]
        from certipatch import cli

        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()
        if command["folder"]:
            files.with_suffix(".count").write_text(str(operations[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _obey_modes() -> None:
    """Give up the right of root to write anything: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (Linux)."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    library = ctypes.CDLL(None, use_errno=True)
    assert library.capget(header, data) == 0
    data[0] &= ~0b110  # of the effective ones
    assert library.capset(header, data) == 0


def _count_operations(command: dict) -> list[int]:
    """Count folders made, files opened to be written or settled, and renames; let the asked one fail."""
    import errno

    number = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir") or not str(arguments[0]).startswith(command["folder"]):
            return
        path, mode = str(arguments[0]), arguments[1]
        if event == "open" and not path.endswith(".part") and not (isinstance(mode, str) and set(mode) & set("wax+")):
            return
        number[0] += 1
        if number[0] == command["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if command["full_from"] is not None and number[0] >= command["full_from"]:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    sys.addaudithook(hook)
    return number


if __name__ == "__main__":
    serve()
