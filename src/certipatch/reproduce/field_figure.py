"""Figure 7 of PatchGuard: a cell looks most at the centre of its receptive field."""

import io

from certipatch.defenses.base import ViewDefense
from certipatch.models import receptive_fields
from certipatch.reproduce import masking
from certipatch.reproduce.context import missing
from certipatch.reproduce.rows import Plan, format_words, paper_rows
from certipatch.reproduce.table import Cell, Number, Row, Table
from certipatch.saved import open_defense, read_card

PICTURES = 200


def receptive_field_figure(plan: Plan) -> Table:
    """Figure 7: the number of paths of 3-wide 1-D convolutions from each cell, and a trained network's mean gradient."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = []
    for layers in (2, 3):
        counts = masking.looks(layers).int().tolist()
        rows.append(Row(f"{layers} layers", [" ".join(map(str, counts))]))
    (spec,), context = plan.rows, plan.context
    slot = plan.study.model(spec.model)
    folder, gradient = context.folder(slot), None
    cell: Cell = missing(slot)
    if folder is not None:
        card = read_card(folder)
        pictures = context.pictures(card)
        defense = open_defense(str(folder))[0]
        assert isinstance(defense, ViewDefense)
        fields = receptive_fields(defense.model, card.image_size)
        middle = fields.grid[0] // 2 * fields.grid[1] + fields.grid[1] // 2
        indices = range(min(PICTURES, len(pictures)))
        batches = (pictures.images(indices[i : i + 50]) for i in range(0, len(indices), 50))
        shown = fields.visible(card.image_size)[middle]
        gradient = masking.attention(defense.model, batches, middle)[shown.any(1)][:, shown.any(0)]
        top, left = (length // 4 for length in gradient.shape)
        centre = gradient[top:-top, left:-left]
        cell = Number(
            float(100 * centre.sum() / gradient.sum()), " % of the gradient in the middle quarter of the area"
        )
    rows += [Row(format_words(plan, spec, slot) or slot.name, [cell]), *paper_rows(plan)]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if gradient is not None else 2)
    for axis, layers in zip(axes, (2, 3), strict=False):
        counts = masking.looks(layers).numpy()
        axis.bar(range(1, len(counts) + 1), counts, color="#2171b5")
        axis.set(title=f"{layers} layers of width 3", xlabel="input cell", ylabel="times looked at")
        axis.set_xticks(range(1, len(counts) + 1))
        axis.spines[["top", "right"]].set_visible(False)
    if gradient is not None:
        image = axes[2].imshow(gradient.numpy(), cmap="Blues", vmin=0)
        axes[2].set(title=f"{slot.name}: |∂ logit / ∂ pixel|", xlabel="pixels of its receptive field")
        figure.colorbar(image, ax=axes[2], shrink=0.8)
    file = io.BytesIO()
    figure.savefig(file, dpi=160)
    return Table(list(plan.columns), rows, figures={"figure.png": file.getvalue()})
