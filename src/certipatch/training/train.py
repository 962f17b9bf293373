"""Training: a recipe and pictures in, a certified defense on disk out."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Bool
from lightning.fabric import Fabric
from torch import Tensor, nn

from certipatch.data import Pictures, load
from certipatch.errors import InputError
from certipatch.plumbing import devices
from certipatch.plumbing.versions import versions
from certipatch.saved import card as cards
from certipatch.saved.weights import save_weights
from certipatch.threats import PatchThreat
from certipatch.training import checkpoint, start
from certipatch.training.augment import draw_changes, recoloured
from certipatch.training.interval import IntervalObjective
from certipatch.training.mask_search import MaskHierarchy, MaskMemory, masks_of
from certipatch.training.masking import MaskLoss
from certipatch.training.muon import Muon
from certipatch.training.recipe import IntervalTraining, Recipe
from certipatch.training.view_loss import view_loss
from certipatch.training.watch import bounded_held_out, cut_log, held_out, log, masked_held_out, words
from certipatch.views import mask_set
from certipatch.views.render import image_size

CHECKPOINT_SECONDS = 60.0
ON_THE_DEVICE = 4 * 2**30  # bytes of pictures that lie on the accelerator as a whole
Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what to show beside the bar)."""


def train(recipe: Recipe, out: Path, progress: Progress = lambda done, total, text: None) -> cards.Card:
    """Train ``recipe`` into the folder ``out`` (``weights.safetensors``, ``card.json``, ``log.jsonl``).

    Writes a checkpoint each minute and each epoch, and goes on from it exactly: a training that was killed ends with
    the same weights as one that was not. A finished folder is left as it is.

    Under torchrun each process works on its share of every batch, and gradients are averaged, weighted, to those of the
    mean over the batch. A BatchNorm sees its process's share only; the first process's running statistics are kept. The
    first process writes, and gives the card; the others give it without weights.

    Errors: InputError on data that does not fit the recipe, or where ``out`` holds another training.
    """
    pictures = load(recipe.data, recipe.split, size=recipe.resize, limit=recipe.limit)
    identity = _identity(recipe, pictures)
    if (out / "card.json").exists():
        card = cards.read(out)
        if card.training.get("identity") != identity:
            raise InputError(f"{out} holds another training ({card.name}); give a new --out")
        return card
    out.mkdir(parents=True, exist_ok=True)
    if recipe.holdout >= len(pictures):
        raise InputError(f"holdout {recipe.holdout} leaves none of {len(pictures)} pictures; use --set holdout=…")
    every = pictures.decode_all()
    targets = torch.from_numpy(pictures.labels)
    size = image_size(every)
    if (recipe.augment.crop or 0) > min(size):
        raise InputError(f"augment.crop: {recipe.augment.crop} pixels do not fit pictures of {size[0]}x{size[1]}")
    blank = cards.Card(
        name=recipe.name,
        defense=recipe.defense,
        settings=recipe.settings,
        views=recipe.views,
        model=recipe.model,
        image_size=size,
        channels=every.shape[1],
        classes=pictures.class_names,
        resize=recipe.resize is not None,
        sha256="",
        data={"name": pictures.name, "split": pictures.split, "pictures": len(pictures), "note": pictures.note},
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.seed,
        versions=versions(),
    )
    fabric = devices.fabric(recipe.precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = blank.network()
        layout = devices.training_layout(network)
        network = network.to(memory_format=layout)  # type: ignore[call-overload]
        bounded = None if recipe.interval is None else _bounded(recipe.interval, blank, network)
    trained = network if bounded is None else bounded
    if recipe.init_from is not None:
        start.start_from(recipe.init_from, network, blank.classes)
    start.freeze(recipe.frozen, network)
    optimizer = _optimizer(recipe, trained)
    train_count = len(every) - recipe.holdout
    sets = [] if recipe.mask_training is None else masks_of(blank.build(network), size)
    climbing = recipe.mask_training is not None and recipe.mask_training.strategy == "hill-climbing"
    memory = MaskMemory(train_count, sets[0]) if climbing else None
    remembered = None if memory is None else memory.centres
    first = checkpoint.load(out / "checkpoint.safetensors", trained, optimizer, identity, remembered)
    _check_same_start(fabric, first, out)
    module, stepped = fabric.setup(trained, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # what a checkpoint brought goes to where the parameters now are
    loss_of: Callable[[Tensor, Tensor, float, torch.Generator], Tensor]
    if recipe.interval is not None:
        loss_of = module
    elif sets:
        loss_of = _masked(recipe, sets, network, module, fabric, memory, len(blank.classes))
    else:
        loss_of = view_loss(recipe, blank, network, module, fabric.device)
    if fabric.device.type != "cpu" and every.numel() <= ON_THE_DEVICE:
        every, targets = every.to(fabric.device), targets.to(fabric.device)
    per_epoch = math.ceil(train_count / recipe.batch_size)
    total = per_epoch * recipe.epochs
    seconds = cut_log(out, first) if fabric.global_rank == 0 else 0.0
    started = saved = time.monotonic()
    order, epoch_of_order, mean = torch.empty(0, dtype=torch.int64), -1, math.nan
    module.train()
    start.freeze(recipe.frozen, network)
    for step in range(first, total):
        epoch, position = divmod(step, per_epoch)
        if epoch != epoch_of_order:
            order = torch.randperm(train_count, generator=_generator(recipe.seed, epoch, 1)).to(every.device)
            epoch_of_order = epoch
        chosen = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        draw = _generator(recipe.seed, step, 2)
        share = step / total
        augment = recipe.augment if share < recipe.strong_augment_end else recipe.augment.plain
        changes = draw_changes(len(chosen), size, augment, draw)
        images = changes.of(every[chosen]).float().div_(255)
        if augment.colour_jitter:
            images = recoloured(images, augment.colour_jitter, draw)
        chunk, weight = share_of_batch(len(chosen), fabric.global_rank, fabric.world_size)
        if memory is not None:
            memory.set_batch(chosen, changes, chunk)
        images = images[chunk].to(fabric.device, memory_format=layout)
        for group in stepped.param_groups:
            group["lr"] = recipe.learning_rate * group.get("scale", 1.0) * _rate(recipe, share)
        stepped.zero_grad(set_to_none=True)
        loss = weight * loss_of(images, targets[chosen][chunk].to(fabric.device), share, draw)
        fabric.backward(loss)
        if memory is not None:
            memory.synchronize(fabric)
        stepped.step()
        done, epoch_ends = step + 1, (step + 1) % per_epoch == 0
        if done % 10 == 0 or epoch_ends:
            mean = fabric.all_reduce(loss.detach(), reduce_op="mean").item()  # type: ignore[union-attr]
            if not math.isfinite(mean):
                raise InputError(f"the loss became {mean} at step {done}; use a lower learning_rate")
            progress(done, total, f"epoch {epoch + 1}/{recipe.epochs}  loss {mean:.3f}")
        if fabric.global_rank == 0 and epoch_ends:
            kept = every[train_count:], targets[train_count:]
            if bounded is not None:
                held = bounded_held_out(bounded, *kept)
            elif isinstance(loss_of, MaskLoss):
                held = masked_held_out(loss_of, *kept, fabric.device)
            else:
                held = held_out(recipe, blank, network, *kept, fabric.device)
            spent = seconds + time.monotonic() - started
            log(out, {"epoch": epoch + 1, "step": done, "loss": round(mean, 4), "seconds": round(spent), **held})
            progress(done, total, f"epoch {epoch + 1}/{recipe.epochs}  loss {mean:.3f}  {words(held)}")
            module.train()
            start.freeze(recipe.frozen, network)
        if fabric.global_rank == 0 and (epoch_ends or time.monotonic() - saved > CHECKPOINT_SECONDS):
            saved = time.monotonic()
            checkpoint.save(out / "checkpoint.safetensors", trained, optimizer, done, identity, remembered)
    card = blank
    if fabric.global_rank == 0:
        spent = seconds + time.monotonic() - started
        digest = save_weights(out, network, recipe.weight_dtype)
        training = {
            "identity": identity,
            "seconds": round(spent, 1),
            "steps": total,
            "device": str(fabric.device.type),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "processes": fabric.world_size,
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        card = blank.model_copy(update={"sha256": digest, "training": training})
        cards.write(out, card)
        (out / "checkpoint.safetensors").unlink(missing_ok=True)
    return card


def share_of_batch(pictures: int, rank: int, count: int) -> tuple[slice, float]:
    """The images of a batch that one of ``count`` processes works on, and the weight of its mean loss.

    The mean of the weighted losses of all processes is the mean over the pictures, also where some have more of them
    than others. A process that is left without any takes the first one along, at weight 0.
    """
    own = len(range(rank, pictures, count))
    return (slice(rank, None, count), own * count / pictures) if own else (slice(0, 1), 0.0)


def _check_same_start(fabric: Fabric, first: int, out: Path) -> None:
    """InputError unless all processes go on from the same step, as they do where they share a folder."""
    expected = fabric.broadcast(first)
    if first != expected:
        raise InputError(
            f"process {fabric.global_rank} finds step {first} in {out}, the first one step {expected}; give one shared folder"
        )


def _identity(recipe: Recipe, pictures: Pictures) -> str:
    values = {
        "recipe": recipe.model_dump(mode="json", exclude={"data", "init_from"}, exclude_defaults=True),
        "data": pictures.fingerprint(),
    }
    if recipe.init_from is not None:
        values["start"] = start.identity(recipe.init_from)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _generator(seed: int, number: int, purpose: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _bounded(settings: IntervalTraining, card: cards.Card, network: nn.Module) -> IntervalObjective:
    return IntervalObjective(network, settings, (card.channels, *card.image_size), len(card.classes))


def _optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        groups = network.parameter_groups() if isinstance(network, IntervalObjective) else network.parameters()
        return torch.optim.Adam(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "muon":
        return Muon(network, recipe.learning_rate, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(), recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        )
    return torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)


def _rate(recipe: Recipe, share: float) -> float:
    """Learning rate relative to its peak."""
    if recipe.halving_interval is None:
        return _schedule(share, recipe.warmup_fraction)
    assert recipe.interval is not None
    return 0.5 ** max(0, math.floor((share - recipe.interval.ramp_end) / recipe.halving_interval))


def _schedule(share: float, warmup: float) -> float:
    """Learning rate relative to its peak: a linear rise, then half a cosine down to 0."""
    if share < warmup:
        return (share + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _masked(
    recipe: Recipe,
    sets: list[Bool[Tensor, "_ H W"]],
    network: nn.Module,
    module: nn.Module,
    fabric: Fabric,
    memory: MaskMemory | None,
    classes: int,
) -> MaskLoss:
    """The loss under two masks of the recipe's defense, with coarser sets of masks before them if the recipe has them."""
    training, settings, finest = recipe.mask_training, recipe.settings, sets[0]
    assert training is not None
    threat, (height, width) = PatchThreat(settings["patch"]), finest.shape[1:]
    levels = [*(mask_set([threat], (height, width), (k, k)) for k in training.coarse_grids), finest]
    fill = settings.get("fill")
    fill = getattr(network, "fill", 0.5) if fill is None else tuple(fill) if isinstance(fill, list) else fill
    masks, until, smaller = MaskHierarchy(levels, fabric.device), recipe.strong_augment_end, []
    if training.small_mask_fraction:
        smaller = [MaskHierarchy([*levels, *sets[1 : n + 1]], fabric.device) for n in range(1, len(sets))]
    return MaskLoss(network, module, masks, training, fill, fabric.autocast, memory, classes, until, smaller)
