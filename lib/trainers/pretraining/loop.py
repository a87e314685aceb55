"""The training loop: resumable, seeded, stops by the clock, keeps averaged weights."""

import copy
import csv
import logging
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib.durable import publish, stage
from lib.models.matchseg import load_weights, pooled, save_weights
from lib.models.network import Encoded, MatchSegNet, NetworkConfig, Output, Remembered
from lib.trainers.pretraining.episodes import Episode, EpisodeMaker
from lib.trainers.pretraining.losses import episode_loss
from lib.trainers.pretraining.pack import Pack
from lib.trainers.pretraining.tasks import TaskSource
from lib.trainers.pretraining.validation import HeldOut, log_scores, write_page

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """What one call of the loop does.

    Attributes:
        minutes: wall-clock budget of this call.
        total_minutes: budget of the whole schedule over all calls; the rate falls with it.
        size: working size in pixels of this call.
        images: images an episode.
        queries: how many of them are queries; all are references of each other.
        episodes: episodes a step.
        rate: learning rate of the new layers; the encoder has `encoder_rate`.
        synthetic: share of synthetic anatomies.
        regions: share of region tasks on real pictures.
        one_place: share of tasks that keep the contrast of their modality.
        seed: of tasks and augmentation.
        device: "cpu", "cuda", ...
        average: share that the averaged weights keep at each step.
        validate_minutes: how often the held-out pictures are segmented; 0: never.
    """

    minutes: float
    total_minutes: float
    size: int = 192
    images: int = 12
    queries: int = 5
    episodes: int = 2
    most_supports: int = 11
    rate: float = 1e-3
    encoder_rate: float = 2e-4
    synthetic: float = 0.35
    regions: float = 0.08
    one_place: float = 0.0
    seed: int = 0
    device: str = "cpu"
    average: float = 0.998
    validate_minutes: float = 10.0


def train(
    pack: Pack,
    folder: Path,
    plan: TrainingPlan,
    *,
    encoder: Path | None,
    start: Path | None,
    on_progress: Callable[[int, float, float], None] | None = None,
) -> Path:
    """Train until the budget is spent or a signal asks to stop; resumes from `checkpoint.pt`.

    Args:
        pack: of `pack`.
        folder: checkpoint, `log.csv`, `validation.csv`, `progress.html` and `averaged.safetensors`
            go there.
        plan: see `TrainingPlan`.
        encoder: ImageNet MobileNetV2 features to begin with (new runs only), or None.
        start: weights of an earlier run to begin with, without optimizer state (new runs only).
        on_progress: called with (step, loss, seconds left).

    Returns:
        The path of the averaged weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    net = MatchSegNet(NetworkConfig())
    checkpoint = folder / "checkpoint.pt"
    step, spent = 0, 0.0
    state = None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        step, spent = int(state["step"]), float(state["spent"])
        net.load_state_dict(state["net"])
    elif start is not None:
        net = load_weights(start)
    elif encoder is not None:
        load_imagenet(net, encoder)
    device = torch.device(plan.device)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = copy.deepcopy(net)
    own = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(net.encoder.parameters()), "base": plan.encoder_rate},
            {"params": own, "base": plan.rate},
        ],
        lr=plan.rate,
        weight_decay=0.01,
    )
    if state is not None:
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        for group, base in zip(optimizer.param_groups, (plan.encoder_rate, plan.rate), strict=True):
            group["base"] = base
    tasks = TaskSource(pack, size=plan.size, seed=plan.seed + step)
    episodes = EpisodeMaker(size=plan.size, seed=plan.seed + step, one_place=plan.one_place)
    began, saved = time.monotonic(), time.monotonic()
    families: defaultdict[str, list[float]] = defaultdict(list)
    first_step = step
    held_out, validated = HeldOut(pack, size=plan.size), time.monotonic()
    stop = _stop_on_signal()
    while time.monotonic() - began < plan.minutes * 60 and not stop.is_set():
        done = min(1.0, (spent + time.monotonic() - began) / (plan.total_minutes * 60))
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = group["base"] * warm * max(0.02, 1 - done)
        optimizer.zero_grad(set_to_none=True)
        total, dice = 0.0, 0.0
        for _ in range(plan.episodes):
            task = tasks.draw(plan.images, synthetic=plan.synthetic, regions=plan.regions)
            episode = episodes.make(task, most_supports=plan.most_supports, queries=plan.queries)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss, achieved = forward(net, episode, device)
            (loss / plan.episodes).backward()
            total += loss.item() / plan.episodes
            dice += float(achieved) / plan.episodes
            families[episode.family].append(float(achieved))
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        step += 1
        with torch.no_grad():
            keep = min(plan.average, (step + 1) / (step + 10))
            for mean, now in zip(averaged.parameters(), net.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        left = plan.minutes * 60 - (time.monotonic() - began)
        _log(
            folder / "log.csv",
            step,
            total,
            dice,
            float(norm),
            spent + time.monotonic() - began,
            families,
        )
        if on_progress:
            on_progress(step, total, left)
        if step % 100 == 0:
            pace = (time.monotonic() - began) / (step - first_step)
            recent = {k: round(sum(v[-20:]) / len(v[-20:]), 2) for k, v in sorted(families.items())}
            logger.info(
                "step %d, %.2f s a step, %.0f min left, Dice by family %s",
                step,
                pace,
                left / 60,
                recent,
            )
        if time.monotonic() - saved > 300 or left <= 0:
            saved = time.monotonic()
            _save(checkpoint, net, averaged, optimizer, step, spent + saved - began)
            save_weights(averaged, folder / "averaged.safetensors")
        if 0 < plan.validate_minutes * 60 < time.monotonic() - validated:
            _validate(folder, held_out, averaged, step, device)
            validated = time.monotonic()
    _save(checkpoint, net, averaged, optimizer, step, spent + time.monotonic() - began)
    save_weights(averaged, folder / "averaged.safetensors")
    if plan.validate_minutes:
        _validate(folder, held_out, averaged, step, device)
    return folder / "averaged.safetensors"


def forward(net: MatchSegNet, episode: Episode, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and achieved soft Dice of an episode."""
    output = segment_episode(net, episode, device)
    return episode_loss(output, episode.masks[: len(episode.supports)].to(device))


def segment_episode(net: MatchSegNet, episode: Episode, device: torch.device) -> Output:
    """Encode N images once; the first Q are queries, each with its own supports."""
    images = episode.images.to(device, memory_format=torch.channels_last)
    masks = episode.masks.to(device)
    encoded = net.encode(images)
    remembered = net.remember(encoded, masks)
    pick = episode.supports.to(device)
    n = len(pick)  # the first images are queries; all are references of each other
    query = Encoded(
        encoded.descriptor[:n], encoded.tokens[:n], encoded.fine4[:n], encoded.fine2[:n]
    )
    memory = Remembered(
        descriptor=remembered.descriptor[pick],
        mask8=remembered.mask8[pick],
        tokens=remembered.tokens[pick],
        sums4=remembered.sums4[pick],
        sums2=remembered.sums2[pick],
    )
    with torch.no_grad():
        vectors = pooled(encoded.descriptor, images)
        similarity = torch.einsum("qe,qre->qr", vectors[:n].float(), vectors[pick].float())
    return net.segment(query, memory, episode.known.to(device), similarity)


def _validate(
    folder: Path, held_out: HeldOut, averaged: MatchSegNet, step: int, device: torch.device
) -> None:
    scores = held_out.scores(averaged, device)
    log_scores(folder / "validation.csv", step, scores)
    page = write_page(folder)
    if scores:
        mean = sum(score.dice for score in scores) / len(scores)
        logger.info("step %d, Dice %.3f on held-out pictures; %s", step, mean, page.name)


def _stop_on_signal() -> threading.Event:
    """Set by the first interrupt or termination, so that the step at hand is finished and saved."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
    return stop


def load_imagenet(net: MatchSegNet, path: Path) -> None:
    """Start the encoder from torchvision-named MobileNetV2 features, batch norm folded in."""
    from safetensors.torch import load_file

    source = load_file(path)
    stem = net.encoder.stem[-2]
    assert isinstance(stem, torch.nn.Conv2d)
    modules = [(stem, "0.0", "0.1")]
    for i, block in enumerate(net.encoder.blocks):
        convs = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
        names = [(f"{i + 1}.conv.{j}.0", f"{i + 1}.conv.{j}.1") for j in range(len(convs) - 1)]
        names.append((f"{i + 1}.conv.{len(convs) - 1}", f"{i + 1}.conv.{len(convs)}"))
        modules += [(c, *n) for c, n in zip(convs, names, strict=True)]
    with torch.no_grad():
        for conv, weight, norm in modules:
            gain = (
                source[f"{norm}.weight"].float()
                / (source[f"{norm}.running_var"].float() + 1e-5).sqrt()
            )
            conv.weight.copy_(source[f"{weight}.weight"].float() * gain[:, None, None, None])
            assert conv.bias is not None
            conv.bias.copy_(
                source[f"{norm}.bias"].float() - gain * source[f"{norm}.running_mean"].float()
            )


def _save(
    path: Path,
    net: MatchSegNet,
    averaged: MatchSegNet,
    optimizer: torch.optim.Optimizer,
    step: int,
    spent: float,
) -> None:
    parts = {
        "net": net.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": spent,
    }
    publish(stage(path, lambda file: torch.save(parts, file)), path)


def _log(
    path: Path,
    step: int,
    loss: float,
    dice: float,
    norm: float,
    seconds: float,
    families: dict[str, list[float]],
) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["step", "loss", "soft_dice", "gradient_norm", "seconds", "families_seen"]
            )
        writer.writerow(
            [step, f"{loss:.4f}", f"{dice:.4f}", f"{norm:.3f}", f"{seconds:.0f}", len(families)]
        )
