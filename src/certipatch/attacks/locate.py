"""Order of the locations that a patch attack tries: random, all, coarse to fine by gradients, or by the certificate."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from certipatch.attacks.base import Task, Victim
from certipatch.attacks.clean_views import CleanViews
from certipatch.attacks.places import Places
from certipatch.attacks.pool import Begin
from certipatch.errors import InputError

COARSE = 12  # locations of the coarse grid that are painted and looked at
FINE = 2  # of these, whose neighbours are looked at too


def gains(victim: Victim, task: Task, places: Places) -> Float[Tensor, "B L"]:
    """Estimate the rise of the loss by a patch at each location, to first order: exact for a linear loss.

    A pixel x with gradient g gains most at 1 where g > 0, at 0 elsewhere: max(g·(1 − x), −g·x).
    """
    images = task.images.detach().clone().requires_grad_()
    with torch.enable_grad():
        picture = torch.arange(len(images))
        loss = task.loss(victim.leads(images, task.generator(0, -2)), picture)
        (gradient,) = torch.autograd.grad(loss.sum(), images)
    pixels = torch.maximum(gradient * (1 - task.images), -gradient * task.images).sum(1)
    return places.sums(pixels)


def coarse_to_fine(victim: Victim, task: Task, places: Places, number: int) -> Int64[Tensor, "B number"]:
    """The most promising locations of each image, best first, by single steps of the attack itself.

    Places of largest gain, apart from each other by half a patch, are painted along the gradient and looked at; then
    the neighbours of the best ones. Behind all that were looked at come the others in the order of their gain.
    """
    gain = gains(victim, task, places).float().cpu()
    apart = max(1, places.side // 2)
    best = torch.full_like(gain, -torch.inf)
    coarse = torch.stack([_spread(row, places, COARSE, apart) for row in gain])
    best.scatter_(1, coarse, _painted(victim, task, places, coarse))
    leading = best.topk(min(FINE, best.shape[1]), 1).indices
    wanted = [torch.cat([places.near(int(place), max(1, apart - 1)) for place in row]) for row in leading]
    most = max(len(row) for row in wanted)
    fine = torch.stack([torch.cat([row, row[:1].expand(most - len(row))]) for row in wanted])
    best.scatter_(1, fine, _painted(victim, task, places, fine))
    seen = best.isfinite()
    rest = gain - gain.amax(1, keepdim=True) - 1 + torch.where(seen, best, 0).amin(1, keepdim=True).clamp(max=0)
    return torch.where(seen, best, rest).topk(min(number, gain.shape[1]), 1).indices


SEARCHES = ("random", "exhaustive", "gradient", "margin", "certified", "auto")


def check_search(search: str) -> None:
    """InputError on another word than those of ``plan``."""
    if search not in SEARCHES:
        raise InputError(f"--search {search!r} is not known; use one of {', '.join(SEARCHES)}")


def plan(victim: Victim, task: Task, places: Places) -> list[Int64[Tensor, "starts count"]]:
    """The choices of locations of every start of every image.

    ``search``: ``random``; ``exhaustive`` (every location once, whatever the number of starts); ``gradient``
    (coarse to fine); ``margin`` (weakest locations of the certificate first, then random ones); ``certified`` (only locations
    that a certificate covers, weakest first and random ones in turn); ``auto`` (gradient, margin and random in turn).

    Errors: InputError on another word, and where the search does not fit the threat or the defense.
    """
    check_search(task.search)
    makers: dict[str, Callable[[], list[Tensor]]] = {
        "random": lambda: _random(task, places),
        "exhaustive": lambda: _exhaustive(task, places),
        "gradient": lambda: _ranked(task, places, _guided(victim, task, places)),
        "margin": lambda: _ranked(task, places, _weakest(task, places)),
        "certified": lambda: _certified(task, places),
        "auto": lambda: _auto(victim, task, places),
    }
    return makers[task.search]()


def noisy_starts(victim: Victim, task: Task) -> tuple[Begin, int, list[int]]:
    """Plan a ``Pool`` of gradient steps on patches: its begin (random paint at planned locations); patches, starts of each image.

    Errors: InputError if the victim gives no gradient, and as ``plan``.
    """
    victim.check_gradients(task.images)
    places = task.places()
    chosen = plan(victim, task, places)
    masks = [places.masks(choice) for choice in chosen]

    def begin(picture: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.rand(task.images.shape[1:], generator=task.generator(picture, start))
        return noise, masks[picture][start], chosen[picture][start]

    return begin, places.count, [len(choice) for choice in chosen]


def _random(task: Task, places: Places) -> list[Tensor]:
    return [places.draw(task.starts, task.generator(b, -1)) for b in range(len(task.images))]


def _exhaustive(task: Task, places: Places) -> list[Tensor]:
    if places.count > 1:
        raise InputError("--search exhaustive tries the places of one patch; use random for several")
    return [torch.arange(len(places))[:, None]] * len(task.images)


def _guided(victim: Victim, task: Task, places: Places) -> list[Tensor]:
    planned = []
    step = max(1, task.batch // 8)
    for first in range(0, len(task.images), step):
        planned += coarse_to_fine(victim, _part(task, first, step), places, task.starts).unbind()
    return planned


def _weakest(task: Task, places: Places) -> list[Tensor]:
    margins = task.margins
    if margins is None or margins.shape[1] != len(places):
        raise InputError("--search margin needs a certificate with a margin for every place; use gradient or random")
    return [row.argsort(stable=True) for row in margins]


def _certified(task: Task, places: Places) -> list[Tensor]:
    planned = []
    for b, weakest in enumerate(_weakest(task, places)):
        assert task.margins is not None
        covered = weakest[task.margins[b, weakest] > 0]
        mixed = covered[torch.randperm(len(covered), generator=task.generator(b, -1))]
        planned.append(_in_turn([covered, mixed], task.starts)[:, None])
    return planned


def _auto(victim: Victim, task: Task, places: Places) -> list[Tensor]:
    sources = [_random(task, places)]
    if places.count > 1:
        return sources[0]
    sources = [[row[:, 0] for row in sources[0]], *([_guided(victim, task, places)] if task.starts > 1 else [])][::-1]
    if task.margins is not None and task.margins.shape[1] == len(places) and bool(task.margins.isfinite().any()):
        sources.insert(1, _weakest(task, places))
    return [_in_turn([source[b] for source in sources], task.starts)[:, None] for b in range(len(task.images))]


def _ranked(task: Task, places: Places, order: list[Tensor]) -> list[Tensor]:
    """The first locations of an order, then random ones; for several patches random choices among the first."""
    if places.count == 1:
        return [
            _in_turn([torch.cat([row[: task.starts], draw[:, 0]])], task.starts)[:, None]
            for row, draw in zip(order, _random(task, places), strict=True)
        ]
    planned = []
    for b, row in enumerate(order):
        top = row[: max(places.count, COARSE)]
        pick = torch.randint(len(top), (task.starts, places.count), generator=task.generator(b, -1))
        planned.append(top[pick])
    return planned


def _in_turn(sources: list[Tensor], number: int) -> Int64[Tensor, " n"]:
    """Numbers from several lists, one from each in turn, none twice; where all are used up, from the start again."""
    longest = max(len(source) for source in sources)
    rows = [place for i in range(longest) for source in sources for place in source[i : i + 1].tolist()]
    unique = list(dict.fromkeys(rows))
    return torch.tensor([unique[i % len(unique)] for i in range(number)] if unique else [], dtype=torch.int64)


def _spread(gain: Float[Tensor, " L"], places: Places, number: int, apart: int) -> Int64[Tensor, " number"]:
    """Places of largest gain, none within ``apart`` pixels of a better one; filled up with the next best."""
    left, chosen = gain.clone(), []
    while len(chosen) < number and bool(left.isfinite().any()):
        chosen.append(int(left.argmax()))
        left[places.near(chosen[-1], apart)] = -torch.inf
    return torch.tensor([*chosen, *[chosen[-1]] * (number - len(chosen))])


def _painted(victim: Victim, task: Task, places: Places, choice: Int64[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """Losses with locations painted black or white, pixel by pixel along the gradient at a grey patch."""
    number, picture = choice.shape[1], torch.arange(len(choice)).repeat_interleave(choice.shape[1])
    clean = CleanViews.of(victim, task)

    def losses_of(images: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        if clean is None:
            return task.loss(victim.leads(images, task.generator(0, -2)), rows)
        return task.loss(clean.leads(images, rows, mask), rows)

    losses = []
    for part in torch.arange(len(picture)).split(task.batch):
        rows, mask = picture[part], places.masks(choice.flatten()[part][:, None]).to(task.images.device)
        images = task.images[rows]
        grey = torch.where(mask, torch.full_like(images, 0.5), images).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(losses_of(grey, rows, mask).sum(), grey)
        painted = torch.where(mask, (gradient > 0).to(images), images)
        with torch.no_grad():
            losses.append(losses_of(painted, rows, mask).cpu())
    return torch.cat(losses).float().view(-1, number)


def _part(task: Task, first: int, step: int) -> Task:
    here = slice(first, first + step)
    margins = None if task.margins is None else task.margins[here]
    return replace(task, images=task.images[here], label=task.label[here], numbers=task.numbers[here], margins=margins)
