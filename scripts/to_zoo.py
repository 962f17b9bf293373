"""Put a trained defense into the zoo, with what its runs measured: python scripts/to_zoo.py models/m NAME runs/a runs/b."""

import shutil
import sys
from pathlib import Path

from certipatch.plumbing.files import read_config, read_json
from certipatch.saved import card as cards
from certipatch.threats import threat_from_dict


def metric(run: Path) -> dict:
    """One line of measured results from a finished run folder."""
    summary, config = read_json(run / "summary.json"), read_config(run)
    keys = ("dataset", "dataset_note", "split", "images", "model_sha256", "notion")
    keys += ("clean_accuracy", "clean_ci95", "certified_accuracy", "certified_ci95", "certified_by_patch")
    found = {"threat": str(threat_from_dict(summary["threat"]))} | {key: summary[key] for key in keys if key in summary}
    found["versions"] = config["versions"]
    return found


def main(model: Path, name: str, runs: list[Path]) -> None:
    """Copy the weights, and the card with its name and metrics."""
    card = cards.read(model)
    metrics = [metric(run) for run in runs]
    if any(line.pop("model_sha256") != card.sha256 for line in metrics):
        raise SystemExit(f"a run is of another model than {model}")
    target = Path(__file__).parents[1] / "zoo" / name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model / "weights.safetensors", target / "weights.safetensors")
    data = Path(card.recipe["data"]).name  # no path of the machine that trained it
    recipe = card.recipe | {"name": name, "data": data}
    cards.write(target, card.model_copy(update={"name": name, "metrics": metrics, "recipe": recipe}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [Path(run) for run in sys.argv[3:]])
