"""The site's training loop: seeded, stops early or by the clock, goes on where it was killed."""

import copy
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from lib.durable import publish, stage
from lib.errors import TrainingError
from lib.models.devices import is_out_of_memory
from lib.models.matchseg import MatchSegSegmenter, load_weights, save_weights
from lib.models.network import MatchSegNet, NetworkConfig
from lib.settings import RefSegSettings
from lib.trainers.pretraining.episodes import Episode
from lib.trainers.pretraining.loop import forward
from lib.trainers.site.distributed import Ranks
from lib.trainers.site.episodes import EpisodePlan, SiteEpisodes
from lib.trainers.site.packing import PackedCase
from lib.trainers.site.progress import LOG, Epoch, Reached, log_epoch, write_progress
from lib.trainers.site.validation import Validator

logger = logging.getLogger(__name__)

CHECKPOINT, BEST, LAST = "checkpoint.pt", "best.safetensors", "last.safetensors"
WARM_STEPS = 20
FEWEST_IMAGES = 3
PREPARED = 4  # episodes made ahead, where another device computes


@dataclass(frozen=True)
class SitePlan:
    """What one training does.

    Attributes:
        epochs: at most.
        steps: an epoch.
        minutes: at most, over all calls; 0: no limit.
        patience: epochs without a better figure after which it ends; 0: never.
        size: working size in training; 0: the network's own. Smaller than that is not only twice as
            many steps in the time: in the same time it learned far more (docs/results.md).
        images: slices an episode.
        rate: learning rate of all but the encoder.
        encoder_rate: of the encoder.
        average: of the running mean of the weights, which is what is measured and kept.
        regions: share of tasks that need no labels.
        seed: of everything.
    """

    epochs: int = 40
    steps: int = 40
    minutes: float = 60.0
    patience: int = 10
    size: int = 192
    images: int = 8
    rate: float = 1e-3
    encoder_rate: float = 3e-4
    average: float = 0.98
    regions: float = 0.1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class SiteJob:
    """All that a process needs to train; can be sent to another one.

    Attributes:
        folder: checkpoint, best and last weights, progress and log go there.
        start: weights to begin with; None: new ones of this size of network.
        config: of the network.
        training: cases to learn from.
        validation: cases to measure on; none: `BEST` are the last weights.
        unlabelled: file of `pack_unlabelled`.
        plan: how.
        settings: options of retrieval, and of how images were cut.
        mark: of all that must be the same for a stopped training to go on.
        process: `identity` of the one that trains; with several GPUs it starts others.
        total: epochs at most, with those of a training that precedes or follows this one.
        earlier: how far the one went that precedes it.
        schedule: the part of the learning rate's schedule that it takes, from 0 to 1.
        told: progress goes there, see `progress.py`; None: to `folder`.
    """

    folder: Path
    start: Path | None
    config: NetworkConfig
    training: tuple[PackedCase, ...]
    validation: tuple[PackedCase, ...]
    unlabelled: Path | None
    plan: SitePlan
    settings: RefSegSettings
    mark: str
    process: str
    total: int
    earlier: Reached | None = None
    told: Path | None = None
    schedule: tuple[float, float] = (0.0, 1.0)


@dataclass
class _State:
    """What changes from epoch to epoch; all of it is in the checkpoint."""

    net: MatchSegNet
    averaged: MatchSegNet
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    spent: float = 0.0
    best: float = -1.0
    best_epoch: int = 0


def train_site(ranks: Ranks, job: SiteJob) -> None:
    """Train until the epochs, the minutes or the patience end; `BEST` and `LAST` are what it made.

    Raises:
        TrainingError: the disk is full, or the GPU has no room for the smallest episode.
    """
    plan, device = job.plan, ranks.device
    state = _begin(job, device)
    size = plan.size or state.net.config.size
    validator = (
        Validator(job.training, job.validation, job.settings, room=job.folder)
        if ranks.first and job.validation
        else None
    )
    began, before = time.monotonic(), state.spent
    if ranks.first:
        with _explaining_a_full_disk(job):
            _tell(job, state)
    images = plan.images
    while not ranks.agreed(_ended(plan, state)):
        episodes = SiteEpisodes(
            job.training,
            EpisodePlan(
                size=size,
                images=images,
                queries=min(4, images - 1),
                most_supports=images - 1,
                regions=plan.regions,
                seed=plan.seed,
            ),
            unlabelled=job.unlabelled,
        )
        numbers = iter(
            range(
                state.epoch * plan.steps * ranks.count + ranks.rank,
                (state.epoch + 1) * plan.steps * ranks.count,
                ranks.count,
            )
        )
        losses: list[float] = []
        try:
            for step, episode in enumerate(_made(episodes, numbers, ahead=device.type != "cpu")):
                spent = before + time.monotonic() - began
                if ranks.agreed(bool(plan.minutes) and spent >= 60 * plan.minutes):
                    break
                losses.append(_step(state, episode, ranks, job, step, spent))
        except RuntimeError as error:
            if not is_out_of_memory(error) or ranks.count > 1 or images <= FEWEST_IMAGES:
                raise _explained(error) from error
            images = max(FEWEST_IMAGES, images // 2)
            logger.warning("the GPU is full; going on with %d slices an episode", images)
            torch.cuda.empty_cache()
            continue
        state.epoch += 1
        if ranks.first:
            dice = None
            if validator is not None:
                net = copy.deepcopy(state.averaged)
                segmenter = MatchSegSegmenter(net, digest="training", device=str(device))
                dice = validator.measure(segmenter).dice
            state.spent = before + time.monotonic() - began
            _note(job, state, dice, losses)


def _begin(job: SiteJob, device: torch.device) -> _State:
    """As the checkpoint has it, where it is of this very job; else from the start."""
    torch.manual_seed(job.plan.seed)
    net = load_weights(job.start) if job.start is not None else MatchSegNet(job.config)
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    own = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(net.encoder.parameters()), "base": job.plan.encoder_rate},
            {"params": own, "base": job.plan.rate},
        ],
        lr=job.plan.rate,
        weight_decay=0.01,
    )
    state = _State(net, copy.deepcopy(net), optimizer)
    path = job.folder / CHECKPOINT
    if path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - a damaged file is as good as none
            logger.warning("the checkpoint cannot be read (%s); training starts anew", error)
            saved = {}
        if saved.get("mark") == job.mark and (job.folder / BEST).exists():
            net.load_state_dict(saved["net"])
            state.averaged.load_state_dict(saved["averaged"])
            optimizer.load_state_dict(saved["optimizer"])
            state.epoch, state.spent = int(saved["epoch"]), float(saved["spent"])
            state.best, state.best_epoch = float(saved["best"]), int(saved["best_epoch"])
            save_weights(state.averaged, job.folder / LAST)  # versions before this kept none
            logger.info("going on after epoch %d", state.epoch)
        elif saved:
            logger.info("labels or options are others than the checkpoint's: training starts anew")
    if state.epoch == 0:
        (job.folder / LOG).unlink(missing_ok=True)
    return state


def _ended(plan: SitePlan, state: _State) -> bool:
    if state.epoch >= plan.epochs:
        return True
    if plan.minutes and state.spent >= 60 * plan.minutes and state.epoch:
        return True
    return bool(plan.patience) and state.epoch - state.best_epoch >= plan.patience


def _made(episodes: SiteEpisodes, numbers: Iterator[int], *, ahead: bool) -> Iterator[Episode]:
    """Episodes in order; made ahead in threads where the CPU is free."""
    if not ahead:
        yield from map(episodes.make, numbers)
        return
    with ThreadPoolExecutor(PREPARED) as threads:
        waiting = [threads.submit(episodes.make, number) for number in islice(numbers, PREPARED)]
        while waiting:
            ready = waiting.pop(0)
            for number in islice(numbers, 1):
                waiting.append(threads.submit(episodes.make, number))
            yield ready.result()


def _step(
    state: _State, episode: Episode, ranks: Ranks, job: SiteJob, step: int, spent: float
) -> float:
    plan = job.plan
    done = (state.epoch + step / plan.steps) / plan.epochs
    if plan.minutes:
        done = max(done, spent / (60 * plan.minutes))
    begin, end = job.schedule
    done = begin + (end - begin) * min(1, done)
    count = state.epoch * plan.steps + step
    scale = min(1.0, (count + 1) / WARM_STEPS) * max(0.02, (1 + math.cos(math.pi * done)) / 2)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base"] * scale
    state.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(ranks.device.type, dtype=torch.bfloat16):
        loss, _ = forward(state.net, episode, ranks.device)
    loss.backward()
    ranks.average_gradients(state.net)
    norm = torch.nn.utils.clip_grad_norm_(state.net.parameters(), 1.0)
    if torch.isfinite(norm):
        state.optimizer.step()
    keep = min(plan.average, (count + 1) / (count + 10))
    with torch.no_grad():
        for mean, now in zip(state.averaged.parameters(), state.net.parameters(), strict=True):
            mean.lerp_(now, 1 - keep)
    return float(loss.item())


def _note(job: SiteJob, state: _State, dice: float | None, losses: list[float]) -> None:
    """Keep what is best, write the checkpoint, tell how far it is."""
    mean = sum(losses) / max(1, len(losses))
    with _explaining_a_full_disk(job):
        if dice is None or dice > state.best:
            state.best, state.best_epoch = dice or 0.0, state.epoch
            save_weights(state.averaged, job.folder / BEST)
        save_weights(state.averaged, job.folder / LAST)
        if dice is not None:
            log_epoch(job.folder, Epoch(state.epoch, mean, dice, state.spent))
        _save(job, state)
        _tell(job, state)
    measured = "" if dice is None else f", Dice {dice:.4f} in validation (best {state.best:.4f})"
    before = job.earlier.epochs if job.earlier is not None else 0
    epoch = before + state.epoch
    logger.info("epoch %d of at most %d: loss %.3f%s", epoch, job.total, mean, measured)


def _save(job: SiteJob, state: _State) -> None:
    parts = {
        "mark": job.mark,
        "net": state.net.state_dict(),
        "averaged": state.averaged.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "epoch": state.epoch,
        "spent": state.spent,
        "best": state.best,
        "best_epoch": state.best_epoch,
    }
    path = job.folder / CHECKPOINT
    publish(stage(path, lambda file: torch.save(parts, file)), path)


def _tell(job: SiteJob, state: _State) -> None:
    now = Reached(state.epoch, max(0.0, state.best), state.best_epoch, state.spent)
    if job.earlier is not None:
        first = job.earlier
        seconds = first.seconds + state.spent
        now = replace(first, epochs=first.epochs + state.epoch, seconds=seconds)
    write_progress(
        job.told or job.folder,
        now,
        total=job.total,
        images=len(job.training) + len(job.validation),
        process=job.process,
        measures=bool(job.validation),
    )


@contextmanager
def _explaining_a_full_disk(job: SiteJob) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        msg = (
            f"The training cannot write to {job.folder} ({error}). Make room (about 150 MB), then "
            "train again: it goes on after the last whole epoch."
        )
        raise TrainingError(msg) from error


def _explained(error: RuntimeError) -> RuntimeError | TrainingError:
    if is_out_of_memory(error):
        msg = (
            "The GPU has no room for the smallest episode; end what else uses it, choose a smaller "
            "`size` in the request, or start the server with device=cpu."
        )
        return TrainingError(msg)
    if "can't allocate memory" in str(error):
        msg = f"This machine is out of memory; choose fewer `images` or a smaller `size` ({error})."
        return TrainingError(msg)
    return error
