"""Table II of PatchGuard: every local prediction of the undefended network attacked by itself, at one random place."""

from dataclasses import replace

import numpy as np

from certipatch.defenses.undefended import Undefended
from certipatch.models import receptive_fields
from certipatch.reproduce.aggregation import undefended
from certipatch.reproduce.attacked import attacked, target
from certipatch.reproduce.local_logits import Cell, map_of
from certipatch.reproduce.measures import strength_of
from certipatch.reproduce.rows import Plan, paper_rows
from certipatch.reproduce.table import Mean, NotRun, Row, Share, Table
from certipatch.runs.records import read_records
from certipatch.threats import PatchThreat


def attack_every_cell(plan: Plan) -> Table:
    """Shares of wrong local predictions before and after the attacks, and of wrong global ones."""
    (row,), context = plan.rows, plan.context
    slot, threat, strength = plan.study.model(row.model), row.threat(plan.study), strength_of(plan.paper, row)
    assert isinstance(threat, PatchThreat)
    victim = target(context, slot, None)
    if isinstance(victim, NotRun):
        return Table(list(plan.columns), [Row(slot.name, [victim]), *paper_rows(plan)])
    victim = undefended(victim)
    network, size = map_of(victim.defense, victim.name), victim.card.image_size
    whole = attacked(context, victim, threat, strength)
    cells, before, after = receptive_fields(network, size).number(size), [], []
    for cell in range(cells):
        alone = replace(victim, defense=Undefended(Cell(network, cell)), name=f"{victim.name}-cell{cell}")
        records = read_records(attacked(context, alone, threat, strength).folder)
        before.append(np.asarray(records["label"]) != np.asarray(records["target"]))
        after.append(before[-1] | np.asarray(records["broken"]))
    original, final = np.mean(before, 0), np.mean(after, 0)
    wrong = Share(whole.attacked.n - whole.attacked.count, whole.attacked.n)
    ours = Row(victim.card.name, [Mean.of(final), Mean.of(original), Mean.of(final - original), wrong])
    side = threat.locations(size).box(0)[2]
    note = (
        f"{row.patch} patch: {side}x{side} pixels; local: mean over pictures of {cells} predictions each; "
        f"{100 - whole.clean.percent:.1f} % of the global predictions are wrong without an attack"
    )
    return Table(list(plan.columns), [ours, *paper_rows(plan)], [note])
