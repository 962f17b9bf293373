"""The report of a finished run, written again."""

from pathlib import Path

from certipatch.errors import InputError
from certipatch.plumbing import files
from certipatch.report.assemble import of_run
from certipatch.report.attack_page import of_attack
from certipatch.report.certify_page import CertifyPage
from certipatch.runs.reopen import command_of, one_line_errors, reopen_attack, reopen_certify, reopen_evaluation


def rebuild(out: Path, data: str | None = None, model: str | None = None) -> Path:
    """Write the report of a finished run again, whole or not at all; gives its path.

    Args:
        out: a run folder of evaluate, attack or certify.
        data, model: the places of the images and the model; the run's own by default.

    Errors: InputError for an unfinished or foreign folder, and if data or model are missing or have changed.
    """
    command = command_of(out)
    if command == "evaluate":
        job, summary = reopen_evaluation(out, data, model)
        text = of_run(job, out, summary)
    elif command == "attack":
        pictures, summary = reopen_attack(out, data, model)
        with one_line_errors(out):
            text = of_attack(pictures, out, summary)
    elif command == "certify":
        if data is not None:
            raise InputError(
                "--data belongs to runs of evaluate and attack; config.yaml names the pictures of a run of certify"
            )
        page = CertifyPage()
        text = page.page(*reopen_certify(out, model, page))
    else:
        raise InputError(f"{out} was written by {command[:40]!r}; report reads runs of evaluate, attack and certify")
    files.write_text(out / "report.html", text)
    return out / "report.html"
