"""The soundness kit: tries to break a rule's theorem, or a defense's certificates. For your own, too; needs no pytest.

``check_rule`` plays a brute-force adversary against a rule on small random evidence; ``check_defense`` attacks real
images at locations that a defense certified. Both raise AssertionError with the counterexample, or where nothing
could be tried, and return what they did.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Generator, Tensor

from certipatch.certificate import Certificate
from certipatch.defenses.base import Defense
from certipatch.rules.base import Rule, Verdict
from certipatch.threats import PatchThreat, SparseThreat, Threat
from certipatch.views.render import image_size

MakeEvidence = Callable[[Generator, Tensor, int], Tensor]  # generator, sees (L, V), K → evidence (B, V, K)
Attacks = Callable[[Generator, Tensor, Tensor], Tensor]  # generator, evidence (V, K), owned (V,) → attacked (N, V, K)


@final
@dataclass(frozen=True)
class Report:
    """Numbers of a check: ``certified`` of all ``locations``, and ``attacked`` certified ones, with so many attacks.

    ``changed`` of the attacks at locations without a certificate changed the label: the attacks can succeed.
    """

    pictures: int
    locations: int
    certified: int
    attacked: int
    attacks: int
    attacks_elsewhere: int = 0
    changed: int = 0


def _require(condition: object, message: str | Callable[[], str]) -> None:
    if not condition:
        raise AssertionError(message if isinstance(message, str) else message())


def random_relation(generator: Generator, views: int, kind: int) -> Bool[Tensor, "L V"]:
    """One of eight kinds of ``sees``: flat, circular, strided windows, single, all, empty rows, random, unequal."""
    width = int(torch.randint(1, views + 1, (1,), generator=generator))
    circular = (torch.arange(views) - torch.arange(views)[:, None]) % views < width
    flat, single, every = circular[: views - width + 1], torch.eye(views).bool(), torch.ones(1, views).bool()
    some = torch.rand(3, views, generator=generator) < torch.rand(3, 1, generator=generator)
    kinds = [(flat,), (circular,), (circular[::2],), (single,), (every, flat), (~every, single), (some,)]
    return torch.cat([*kinds, (some, circular, single[:1])][kind % 8])


def random_votes(generator: Generator, sees: Bool[Tensor, "L V"], classes: int) -> Shaped[Tensor, "7 V K"]:
    """0/1 votes of seven pictures: any, dense, one clear class; top class only, twice; tied; at a location's limit."""
    views = sees.shape[1]

    def pick(end: int) -> int:
        return int(torch.randint(end, (1,), generator=generator))

    favourite, rival = torch.randperm(classes, generator=generator)[:2].tolist()
    chance = torch.full((7, 1, classes), 0.5)
    chance[1], chance[2], chance[2, :, favourite] = 0.85, 0.1, 0.95
    votes = torch.rand(7, views, classes, generator=generator) < chance
    top = torch.rand(2, views, classes, generator=generator) + torch.stack([chance[0], chance[2]])
    votes[3:5] = top == top.amax(2, keepdim=True)
    count = pick(views + 1)
    for k in range(classes):  # votes of two classes differ by at most 2
        votes[5, :, k] = torch.randperm(views, generator=generator) < count + pick(3) - 1
    owned = sees[pick(len(sees))]
    outside, lead = (~owned).nonzero().flatten(), max(0, int(owned.sum()) + pick(3) - 1)
    votes[6, outside] = bool(pick(2))  # n_y(out) − n_k(out) is |A| − 1, |A| or |A| + 1 for every k, or one off for one
    votes[6, outside[:lead]] = torch.arange(classes) == favourite
    votes[6, outside[:1], rival] |= bool(pick(2))
    return votes.to([torch.bool, torch.uint8, torch.int64, torch.float32][pick(4)])


def random_scores(generator: Generator, sees: Bool[Tensor, "L V"], classes: int) -> Shaped[Tensor, "7 V K"]:
    """Real evidence of seven pictures: even, one clear class, whole numbers with ties, 0/1, below zero, huge, none."""
    shape = (sees.shape[1], classes)
    scores = torch.rand(7, *shape, generator=generator, dtype=torch.float64)
    favourite = int(torch.randint(classes, (1,), generator=generator))
    scores[1, :, favourite] += 1.5
    scores[2] = torch.randint(0, 4, shape, generator=generator).double()
    scores[3] = (scores[3] < torch.tensor([0.9 if k == favourite else 0.15 for k in range(classes)])).double()
    scores[4] = 4 * scores[4] - 2
    scores[4, :, favourite] += 2
    scores[5, torch.rand(shape, generator=generator) < 0.1] *= 1e8
    scores[6] = 0
    scores[6, :, favourite] = torch.rand(shape[0], generator=generator, dtype=torch.float64) < 0.5
    return scores


def anything(low: float, high: float, number: int = 400) -> Attacks:
    """Attacks that give every class of the owned views a plan of its own: leave, least, largest, random, or a trickle.

    The plans hold on a random part of the owned views; ``low`` and ``high`` bound the values. For rules with real
    evidence, where the worst case lies between the extremes: there is no exact answer here, only a search.
    """

    def attacks(generator: Generator, evidence: Shaped[Tensor, "V K"], owned: Bool[Tensor, " V"]) -> Tensor:
        views, classes = evidence.shape
        shape = (number, views, classes)
        base = evidence.double().expand(shape)
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)
        largest = 3 * base.abs().amax()
        size = largest * torch.rand((number, 1, classes), generator=generator, dtype=torch.float64) ** 3
        plans = torch.stack(
            [base, base * 0 + low, base * 0 + high, low + noise * (high - low), noise * size, base * 0 + size]
        )
        plan = torch.randint(len(plans), (number, 1, classes), generator=generator).expand(shape)
        wanted = plans.gather(0, plan[None])[0].clamp(low, high)
        part = torch.rand(shape, generator=generator) < torch.rand((number, 1, 1), generator=generator) * 2
        return torch.where(owned[:, None] & part, wanted, base).to(evidence.dtype)

    return attacks


def extremes(low: float = 0.0, high: float = 1.0, budget: int = 4096) -> Attacks:
    """Attacks that give every score of an owned view its least or largest value.

    All 2^(|A|·K) of them where those are at most ``budget``: for 0/1 votes the exact worst case. Otherwise: all owned
    views for one class alone, for all but one, for all, for none, and 256 at random.
    """

    def attacks(generator: Generator, evidence: Shaped[Tensor, "V K"], owned: Bool[Tensor, " V"]) -> Tensor:
        number, classes = int(owned.sum()), evidence.shape[1]
        if 2 ** (number * classes) <= budget:
            codes = torch.arange(2 ** (number * classes))[:, None] >> torch.arange(number * classes) & 1
            choices = codes.bool().view(len(codes), number, classes)
        else:
            alone = torch.eye(classes).bool()
            same = torch.cat([alone, ~alone, torch.ones(1, classes).bool(), torch.zeros(1, classes).bool()])
            some = torch.rand(256, number, classes, generator=generator) < 0.5
            choices = torch.cat([same[:, None].expand(-1, number, -1), some])
        attacked = evidence.repeat(len(choices), 1, 1)
        attacked[:, owned] = torch.where(choices, high, low).to(evidence.dtype)
        return attacked

    return attacks


def check_rule(
    rule: Rule,
    *,
    views: int,
    classes: int,
    evidence: MakeEvidence = random_votes,
    attacks: Attacks | None = None,
    exact: bool = False,
    trials: int = 64,
    seed: int = 0,
    slack: float = 0.0,
) -> Report:
    """Try to break a rule's theorem on small random evidence (B, V, K) and relations (L, V).

    In every trial: the label of ``certify`` is that of ``predict``; an image alone has the label and margins that it
    has in a batch; a location that sees more never has the larger margin; inputs are unchanged, shapes and dtypes
    right; and no attack on the views of a location of positive margin changes the label. Every second trial has unsure
    views, which belong to every attacker.

    Args:
        rule: the rule; it must accept V = ``views``.
        views: V; small, so that the adversary can be exhaustive.
        classes: K; small too.
        evidence: makes the evidence of a trial; the default makes 0/1 votes, ties among them.
        attacks: the adversary, ``extremes()`` by default. The worst case is only as exact as what it returns.
        exact: also fail where a margin is not positive and no attack changes the label.
        slack: largest allowed rounding of a margin in the comparisons between margins; 0 for rules that count.

    Errors: AssertionError with the counterexample; or if no location was certified, or (``exact``) all were.
    """
    generator = torch.Generator().manual_seed(seed)
    attacks = attacks or extremes()
    pictures = locations = certified = tried = elsewhere = broken = 0
    for trial in range(trials):
        relation = random_relation(generator, views, trial // 2)
        values = evidence(generator, relation, classes)
        unsure = torch.rand(values.shape[:2], generator=generator) < 0.2 * (trial % 2)
        verdict = _verdict(rule, values, relation, unsure if trial % 2 else None, slack)
        pictures += len(values)
        for b in range(len(values)):
            owned = relation | unsure[b]
            attacked = [_attacked(attacks, generator, values[b], row) for row in owned]
            answers = rule.predict(torch.cat(attacked)).split([len(tries) for tries in attacked])
            for row, tries, labels, margin in zip(owned, attacked, answers, verdict.margin[b].tolist(), strict=True):
                changed = (labels != verdict.label[b]).nonzero().flatten().tolist()
                locations, certified, tried = locations + 1, certified + (margin > 0), tried + (margin > 0) * len(tries)
                elsewhere, broken = elsewhere + (not margin > 0) * len(tries), broken + len(changed)
                case = f"label {verdict.label[b]}, margin {margin:g}, views {row.nonzero().flatten().tolist()} attacked"
                if margin > 0 and changed:
                    other = f"label {int(labels[changed[0]])}\nattacked = {tries[changed[0]].tolist()}"
                    raise AssertionError(f"{rule}: {case}: {other}\nevidence = {values[b].tolist()}")
                if exact and not margin > 0 and not changed:
                    raise AssertionError(f"{rule} is not exact: {case} in vain\nevidence = {values[b].tolist()}")
    _require(certified > 0, f"nothing was tried: none of {locations} locations was certified; give clearer evidence")
    _require(not exact or certified < locations, f"exactness was not tried: all {locations} locations were certified")
    return Report(pictures, locations, certified, certified, tried, elsewhere, broken)


def _attacked(attacks: Attacks, generator: Generator, evidence: Tensor, owned: Tensor) -> Tensor:
    attacked = attacks(generator, evidence.clone(), owned)
    if not torch.equal(attacked[:, ~owned], evidence[~owned].expand(len(attacked), -1, -1)):
        raise ValueError("the attacks changed a view that the attacker does not own")
    return attacked


def _verdict(rule: Rule, values: Tensor, relation: Tensor, unsure: Tensor | None, slack: float) -> Verdict:
    """The rule's verdict, after every check that needs no attack."""
    given = [values, relation] if unsure is None else [values, relation, unsure]
    before = [t.clone() for t in given]
    verdict = rule.certify(values, relation, unsure)
    predicted = rule.predict(values)
    _require(all(map(torch.equal, given, before)), f"{rule} changed the caller's tensors")
    _check_shapes(str(rule), verdict, len(values), len(relation))
    _require(torch.equal(verdict.label, predicted), lambda: f"{rule}: {verdict} but predict {predicted}, of\n{values}")
    for b in range(len(values)):
        alone = rule.certify(values[b : b + 1], relation, None if unsure is None else unsure[b : b + 1])
        same = alone.label[0] == verdict.label[b] and torch.allclose(alone.margin[0], verdict.margin[b], 0, slack)
        _require(same, lambda: f"{rule}: picture {b} is {alone} alone but {verdict} in a batch, of\n{values}")  # noqa: B023
    within = (relation[:, None] <= relation).all(2)  # [i, j]: location j sees all that i sees
    grows = within & (verdict.margin[:, None] > verdict.margin[:, :, None] + slack).any(0)
    _require(
        not grows.any(), lambda: f"{rule}: margins grow from row i to j = {grows.nonzero()[0]}, {relation}, {verdict}"
    )
    return verdict


def _check_shapes(what: str, result: Verdict | Certificate, pictures: int, locations: int | None) -> None:
    label, margin = result.label, result.margin
    right = label.dtype == torch.int64 and margin.dtype == torch.float64 and label.shape == (pictures,)
    right &= margin.ndim == 2 and len(margin) == pictures and locations in (None, margin.shape[1])
    _require(right, f"{what}: label {label.dtype} {tuple(label.shape)}, margin {margin.dtype} {tuple(margin.shape)}")


def check_defense(
    defense: Defense,
    images: Float[Tensor, "B C H W"],
    threat: Threat,
    *,
    trials: int = 64,
    seed: int = 0,
    slack: float = 0.0,
) -> Report:
    """Attack images at locations that a defense certified, and hold its answers against each other.

    ``certify`` and ``predict`` give one label, also for other threats; an image alone has the margins that it has in a
    batch, and the label wherever a margin says that rounding cannot turn it; the caller's tensor is unchanged;
    certificates nest over patch sizes; ``largest_patch`` agrees with ``certify``. Then patches are pasted: at the
    image's corners, at the weakest certified locations, at random ones; black, white, random, copied from another
    image and, for at most six values, every black-and-white pattern.

    Args:
        images: images in [0, 1]. Take some that the defense certifies; two or more, to copy patches.
        trials: locations attacked per image; each with 8 to 72 patches.
        slack: largest allowed rounding of a margin between batch sizes (1 per unsure view of a voting defense).

    Errors: AssertionError with the counterexample, or if none was attacked. Confidence 1 − α may fail with chance α.
    """
    generator = torch.Generator().manual_seed(seed)
    before, size = images.clone(), image_size(images)
    cert = defense.certify(images, threat)
    _check_shapes(defense.name, cert, len(images), None)
    predicted = defense.predict(images)
    _require(torch.equal(cert.label, predicted), lambda: f"certify says {cert.label}, predict {predicted}")
    for second_threat in (PatchThreat(1), PatchThreat(min(size)), SparseThreat(1)):
        label = defense.certify(images, second_threat).label
        _require(torch.equal(label, cert.label), f"{second_threat} changes the labels {cert.label} to {label}")
    for b in range(min(len(images), 8)):
        alone = defense.certify(images[b : b + 1], threat)
        same = alone.label[0] == cert.label[b] or not (cert.margin[b] > slack).any()
        same &= torch.allclose(alone.margin[0], cert.margin[b], 0, slack)
        _require(same, f"picture {b}: alone {alone.label} {alone.margin}, in a batch {cert.label[b]} {cert.margin[b]}")
    _check_sizes(defense, images, size, slack)
    _require(torch.equal(images, before), "the caller's pictures were changed")
    attacked = attacks = elsewhere = changed = 0
    for b in range(len(images)):
        for location in _choose(cert, b, trials, generator):
            pixels, certain = _pixels(cert, location, size, generator), bool(cert.margin[b, location] > 0)
            pictures = paste(images, b, pixels, generator)
            answers = defense.certify(pictures, threat)
            wrong = answers.label != cert.label[b]
            if answers.alarm is not None:  # detection: an attack that raises an alarm has failed
                wrong &= ~answers.alarm
            if certain and wrong.any():
                first, margin = int(wrong.nonzero()[0]), cert.margin[b, location].item()
                case = f"picture {b}: label {int(cert.label[b])} certified at location {location}, margin {margin:g}"
                values = f"pixels = {pixels.nonzero().tolist()}\nvalues = {pictures[first][:, pixels].tolist()}"
                raise AssertionError(f"{case}, but a patch there makes it {int(answers.label[first])}\n{values}")
            attacked, attacks = attacked + certain, attacks + certain * len(pictures)
            elsewhere, changed = elsewhere + (not certain) * len(pictures), changed + int(wrong.sum())
    _require(attacked > 0, f"nothing was tried: no location of {len(images)} pictures is certified against {threat}")
    certified = int((cert.margin > 0).sum())
    return Report(len(images), cert.margin.numel(), certified, attacked, attacks, elsewhere, changed)


def _check_sizes(defense: Defense, images: Tensor, size: tuple[int, int], slack: float) -> None:
    """``largest_patch`` is what ``certify`` says at every size up to 8 and around itself; margins fall with the size."""
    evidence = defense.evidence(images)
    largest = defense.largest_patch(evidence)
    around_largest = [] if largest is None else [*largest.tolist(), *(largest + 1).tolist()]
    previous = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    for side in sorted({side for side in (*range(1, 9), *around_largest) if 1 <= side <= min(size)}):
        cert = defense.certificate(evidence, PatchThreat(side))
        smallest = cert.margin.amin(1)
        _require(
            (smallest <= previous + slack).all(), f"margin {smallest} at {side}x{side} exceeds that of a smaller patch"
        )
        agrees = largest is None or torch.equal(cert.certified, largest >= side)
        _require(agrees, f"largest_patch says {largest}, certify({side}x{side}) says {cert.certified}")
        previous = smallest


def _choose(cert: Certificate, picture: int, trials: int, generator: Generator) -> list[int]:
    """First and last locations and the image's corners, the weakest certified ones, and random ones."""
    margin = cert.margin[picture].cpu()
    chosen = [0, len(margin) - 1]
    if cert.sees is not None and len(margin) == len(cert.sees.locations):
        places = cert.sees.locations
        chosen += [int(places.top.sub(places.left).argmin()), int(places.top.sub(places.left).argmax())]
    weakest = margin.masked_fill(margin <= 0, torch.inf).argsort()[: trials // 2].tolist()
    anywhere = torch.randint(len(margin), (trials,), generator=generator).tolist()
    return list(dict.fromkeys(chosen + weakest + anywhere))[: max(trials, len(set(chosen)))]


def _pixels(cert: Certificate, location: int, size: tuple[int, int], generator: Generator) -> Bool[Tensor, "H W"]:
    """The pixels of a location; any so many pixels for a sparse threat."""
    if isinstance(cert.threat, SparseThreat):
        return (torch.randperm(size[0] * size[1], generator=generator) < cert.threat.pixels).view(size)
    places = cert.threat.locations(size)
    chosen = [location] if cert.sees is None else cert.sees.choices[location].tolist()
    return torch.stack([places.pixels(place) for place in chosen]).any(0)


def paste(
    images: Float[Tensor, "B C H W"], picture: int, pixels: Bool[Tensor, "H W"], generator: Generator
) -> Float[Tensor, "N C H W"]:
    """Copies of one image with other values on ``pixels``: the patches that ``check_defense`` names."""
    number = int(pixels.sum()) * images.shape[1]
    noise = torch.rand(5, number, generator=generator)
    noise[2:] = noise[2:].round()
    donor = images[int(torch.randint(len(images), (1,), generator=generator)) - picture][:, pixels].reshape(1, number)
    values = torch.cat([noise, torch.zeros(1, number), torch.ones(1, number), donor.cpu()])
    if number <= 6:
        values = torch.cat([values, (torch.arange(2**number)[:, None] >> torch.arange(number) & 1).to(values)])
    pasted = images[picture].repeat(len(values), 1, 1, 1)
    pasted[:, :, pixels] = values.to(images).view(len(values), images.shape[1], -1)
    return pasted
