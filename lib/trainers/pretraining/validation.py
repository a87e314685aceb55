"""Dice on the held-out halves of a pack, and the page that shows how a run goes.

The held-out pictures are segmented by up to `REFERENCES` pictures of the training half, without
augmentation: figures of one run compare with those of another of the same size and pack.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.durable import write_text
from lib.evaluation.charts import Line, curves
from lib.models.matchseg import standardize
from lib.models.network import MatchSegNet
from lib.trainers.pretraining.episodes import Episode
from lib.trainers.pretraining.pack import Pack, PackedSet

QUERIES, REFERENCES, LABELS = 2, 8, 3
SMOOTHED = 50  # steps to one point of the loss curve


@dataclass(frozen=True)
class Score:
    """Mean Dice of one set's held-out pictures, over the labels that are there."""

    name: str
    dice: float


class HeldOut:
    """A fixed draw of held-out queries and references, one episode a set; decoded when asked."""

    def __init__(self, pack: Pack, *, size: int, seed: int = 0):
        self._pack, self._size = pack, size
        rng = np.random.default_rng(seed)

        def draw(keys: tuple[str, ...], count: int) -> list[str]:
            picks = rng.choice(len(keys), min(count, len(keys)), replace=False)
            return [keys[i] for i in picks]

        self._draws = [
            (s, draw(s.held_out, QUERIES), draw(s.train, REFERENCES))
            for s in pack.sets
            if s.held_out and s.train
        ]

    @torch.no_grad()
    def scores(self, net: MatchSegNet, device: torch.device) -> list[Score]:
        """Hard Dice of each set, with labels competing as they do in use."""
        from lib.trainers.pretraining.loop import segment_episode

        found = []
        for chosen, queries, references in self._draws:
            episode = self._episode(chosen, queries, references)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                scores = segment_episode(net, episode, device).scores.float().cpu()
            best = scores.amax(1, keepdim=True)
            won = ((scores == best) & (best > 0)).float()
            masks = episode.masks[: len(queries)]
            there = masks.amax((2, 3)) > 0
            dice = 2 * (won * masks).sum((2, 3)) / (won + masks).sum((2, 3)).clamp_min(1)
            if bool(there.any()):
                found.append(Score(chosen.name, float(dice[there].mean())))
        return found

    def _episode(self, chosen: PackedSet, queries: list[str], references: list[str]) -> Episode:
        pairs = [self._picture(chosen.name, "held_out", key) for key in queries]
        seen = [value for value in chosen.labels if any(bool((m == value).any()) for _, m in pairs)]
        pairs += [self._picture(chosen.name, "train", key) for key in references]
        values = torch.tensor(seen[:LABELS] or chosen.labels[:1])[:, None, None]
        n, r = len(queries), len(references)
        return Episode(
            images=standardize(torch.stack([p for p, _ in pairs])),
            masks=torch.stack([(m == values).float() for _, m in pairs]),
            supports=torch.arange(n, n + r).expand(n, r),
            known=torch.ones(n, r, len(values), dtype=torch.bool),
            family=chosen.name,
        )

    def _picture(self, name: str, split: str, key: str) -> tuple[Tensor, Tensor]:
        picture, labels = self._pack.read(name, split, key)
        image = torch.from_numpy(np.array(picture)).float() / 255
        image = image[None].expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1)
        side = (self._size, self._size)
        image = F.interpolate(image[None], size=side, mode="bilinear", antialias=True)[0]
        mask = torch.from_numpy(np.array(labels)).float()[None, None]
        return image, F.interpolate(mask, size=side, mode="nearest-exact")[0, 0]


def log_scores(path: Path, step: int, scores: list[Score]) -> None:
    """Append one line a set to a CSV file: step, set, dice."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "set", "dice"])
        writer.writerows([step, s.name, f"{s.dice:.4f}"] for s in scores)


def write_page(folder: Path) -> Path:
    """Draw `log.csv` and `validation.csv` of a run into one page, `progress.html`."""
    steps = _columns(folder / "log.csv", "step", "loss")
    blocks = [steps[i : i + SMOOTHED] for i in range(0, len(steps), SMOOTHED)]
    x = tuple(float(np.mean([s for s, _ in b])) for b in blocks)
    losses = [[v for _, v in b] for b in blocks]
    loss = Line(
        "loss",
        x,
        tuple(float(np.mean(v)) for v in losses),
        tuple(float(np.quantile(v, 0.25)) for v in losses),
        tuple(float(np.quantile(v, 0.75)) for v in losses),
    )
    charts = [
        curves(
            [loss],
            x_label="step",
            y_label="loss, mean and middle half",
            title="Training loss",
            logarithmic=False,
        )
    ]
    by_step: dict[float, list[float]] = {}
    for step, dice in _columns(folder / "validation.csv", "step", "dice"):
        by_step.setdefault(step, []).append(dice)
    if by_step:
        each = list(by_step.values())
        line = Line(
            "held-out sets",
            tuple(by_step),
            tuple(float(np.mean(v)) for v in each),
            tuple(float(np.quantile(v, 0.25)) for v in each),
            tuple(float(np.quantile(v, 0.75)) for v in each),
        )
        charts.append(
            curves(
                [line],
                x_label="step",
                y_label="Dice, mean and middle half of the sets",
                title="Held-out halves of the sets trained on",
                logarithmic=False,
            )
        )
    page = folder / "progress.html"
    head = '<!doctype html><meta charset="utf-8"><title>Pretraining</title>'
    write_text(page, head + "\n".join(charts))
    return page


def _columns(path: Path, first: str, second: str) -> list[tuple[float, float]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [(float(row[first]), float(row[second])) for row in csv.DictReader(file)]
