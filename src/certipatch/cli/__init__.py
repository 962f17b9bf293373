"""The command line. Nothing here imports torch until a command needs it."""

import os
import sys

import typer

from certipatch.cli import attack, certify, compare, demo, evaluate, export, listing, report, reproduce, train
from certipatch.errors import InputError
from certipatch.plumbing import distributed

UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]  # click's, which typer brings along under one name or another

app = typer.Typer(
    name="certipatch",
    help="Certified robustness of image classifiers against adversarial patches.",
    epilog="Start with:  certipatch demo",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "demo": demo.demo,
    "list": listing.list_,
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "certify": certify.certify,
    "attack": attack.attack,
    "compare": compare.compare,
    "report": report.report,
    "reproduce": reproduce.reproduce,
    "export": export.export,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Run a command; exit 0, 1 (a claim failed), 2 (bad input, told in one line) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] or ["--help"]
    if os.environ.get("CERTIPATCH_DEBUG"):
        app(arguments)
    try:
        code = app(arguments, standalone_mode=False)
    except UsageError as error:
        code = _fail(f"{error.format_message()} (see certipatch --help)")
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except InputError as error:
        code = _fail(str(error))
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    if code == 130 and distributed.rank() == 0:
        print("stopped; run the same command again to go on", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    if distributed.should_report_error():
        print(f"certipatch: {' '.join(message.split())}", file=sys.stderr)
    return 2
