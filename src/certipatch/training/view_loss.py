"""The loss of a recipe's objective: what a step shows of each picture, and what it asks of the answers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certipatch.defenses.patchguard import malicious_windows
from certipatch.errors import InputError
from certipatch.models import receptive_fields
from certipatch.saved import card as cards
from certipatch.threats import PatchThreat
from certipatch.training import objectives
from certipatch.training.recipe import Recipe
from certipatch.views import Cross, PixelSets, Views
from certipatch.views.incidence import sees
from certipatch.views.render import render


def view_loss(
    recipe: Recipe, card: cards.Card, network: nn.Module, module: nn.Module, device: torch.device
) -> Callable[[Tensor, Tensor, float, torch.Generator], Tensor]:
    """The loss as a function of (images, targets, share of the training done, generator).

    Args:
        network: as it is, from which receptive fields are read.
        module: the same network as it is trained.
    """
    objective, encoding = recipe.objective, getattr(network, "encoding", "null")
    threat = PatchThreat(objective.patch)
    views, drawn = card.created_views(), card.random_views()
    image_size = card.image_size if recipe.augment.crop is None else (recipe.augment.crop, recipe.augment.crop)
    if views is None and encoding == "all-views":
        views = receptive_fields(network.eval(), image_size)
        network.train()
    relation = windows = None
    families: list[tuple[Tensor, Tensor]] = []
    if objective.vote_margin_weight:
        assert views is not None
        relation = _undominated(views, threat, image_size).to(device)
    if objective.masked_cross_entropy_weight:
        assert views is not None
        windows = malicious_windows(views, threat, image_size).members.to(device)
    if objective.mask_margin_weight:
        assert views is not None
        for part in views.parts if isinstance(views, Cross) else [views]:
            reached = _undominated(part, threat, image_size).to(device)
            families.append((reached, malicious_windows(part, threat, image_size).members.to(device)))
    total, spacing = 0 if views is None else views.number(image_size), 1
    if families and objective.views_per_step != "all":
        if any(reached.shape[1] * objective.views_per_step % total for reached, _ in families):
            raise InputError(f"views_per_step: {objective.views_per_step} cannot be evenly spaced among {total} views")
        spacing = total // objective.views_per_step

    def indices(draw: torch.Generator) -> Tensor:
        if objective.views_per_step == "all":
            return torch.arange(total)
        if families:
            return torch.arange(int(torch.randint(spacing, (), generator=draw)), total, spacing)
        return torch.randperm(total, generator=draw)[: objective.views_per_step]

    def shown_of(index: Tensor) -> list[tuple[Tensor, Tensor]]:
        first, drawn_families = 0, []
        for reached, hidden in families:
            own = index[(index >= first) & (index < first + reached.shape[1])] - first
            drawn_families.append((reached[:, own], hidden[:, own]))
            first += reached.shape[1]
        return drawn_families

    def logits_of(images: Tensor, index: Tensor, draw: torch.Generator) -> Tensor:
        if drawn is not None:
            assert objective.views_per_step != "all"
            shown = PixelSets(drawn.draw(image_size, objective.views_per_step, draw))
            rendered = render(encoding, images, shown, torch.arange(objective.views_per_step))
            return module(rendered.flatten(0, 1)).float().unflatten(0, rendered.shape[:2])
        if views is None:
            return module(images)[:, None].float()
        if encoding == "all-views":
            return module(images)[:, index.to(device)].float()
        rendered = render(encoding, images, views, index)
        return module(rendered.flatten(0, 1)).float().unflatten(0, rendered.shape[:2])

    def loss(images: Tensor, targets: Tensor, share: float, draw: torch.Generator) -> Tensor:
        index = indices(draw) if drawn is None and views is not None else torch.empty(0)
        logits = logits_of(images, index, draw)
        terms = (
            [objective.cross_entropy_weight * objectives.cross_entropy(logits, targets)]
            if objective.cross_entropy_weight
            else []
        )
        if objective.pooled_cross_entropy_weight:
            terms.append(objective.pooled_cross_entropy_weight * cross_entropy(logits.mean(1), targets))
        if objective.masked_cross_entropy_weight:
            assert windows is not None
            rest = objectives.without_heaviest_window(logits, targets, windows)
            terms.append(objective.masked_cross_entropy_weight * cross_entropy(rest, targets))
        if share >= objective.margin_start or not terms:
            if relation is not None:
                threshold = recipe.settings.get("threshold")
                margin_loss = objectives.vote_margin_loss(
                    logits, targets, relation, threshold, objective.vote_width, objective.temperature
                )
                terms.append(objective.vote_margin_weight * margin_loss)
            if families:
                scores = logits.sigmoid() if recipe.settings.get("score_type") == "sigmoid" else logits.softmax(-1)
                parts = shown_of(index)
                margin_loss = objectives.mask_margin_loss(
                    scores, targets, parts, objective.margin_temperature, objective.margin_scale
                )
                terms.append(objective.mask_margin_weight * margin_loss)
        return torch.stack(terms).sum()

    return loss


def _undominated(views: Views, threat: PatchThreat, image_size: tuple[int, int]) -> Tensor:
    relation = sees(views, threat, image_size)
    return relation.rows[relation.undominated]
