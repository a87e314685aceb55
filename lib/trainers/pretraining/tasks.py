"""Tasks to train on: each is N images of one kind with a label map, before augmentation.

A task is drawn anew for every episode: labels of a real set (or unions, parts and complements of
them), regions of one real picture in several warped and re-toned copies, or synthetic anatomies.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.trainers.pretraining.pack import Pack, PackedSet


@dataclass(frozen=True, eq=False)
class Task:
    """N images of one kind.

    Attributes:
        images: (N, 3, S, S) float in 0..1.
        labels: (N, S, S) int64, 0 is background, 1..n are the labels to find.
        rigid: in 0..1, how aligned the images already are (1: leave them; 0: warp strongly).
        color: False where the three channels are equal.
        family: name for the log.
    """

    images: Tensor
    labels: Tensor
    rigid: float
    color: bool
    family: str


class TaskSource:
    """Draws tasks from a pack and from nothing."""

    MAX_LABELS = 3
    FINEST = 320  # what packs hold

    def __init__(self, pack: Pack, *, size: int, seed: int):
        self.size = size
        self.side = min(self.FINEST, size * 5 // 3)  # finer than S, so that zooming pays
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._pack = pack
        self._cache: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        # Square root: large sets are drawn more often, but no set dominates.
        weights = np.array([len(s.train) ** 0.5 for s in pack.sets])
        self._weights = weights / weights.sum()

    def draw(self, n: int, *, synthetic: float, regions: float) -> Task:
        """Draw a task of n images; the shares of synthetic and region tasks are given."""
        dice = self.rng.random()
        if dice < synthetic:
            return self._synthetic(n)
        which = int(self.rng.choice(len(self._pack.sets), p=self._weights))
        chosen = self._pack.sets[which]
        if dice < synthetic + regions:
            return self._regions(chosen, n)
        return self._real(chosen, n)

    # ---- real ----------------------------------------------------------------------------------
    def picture(self, chosen: PackedSet, split: str, key: str) -> tuple[Tensor, Tensor]:
        """(3, side, side) uint8 picture and (side, side) labels, kept in memory."""
        name = (chosen.name, key)
        if name not in self._cache:
            picture, labels = self._pack.read(chosen.name, split, key)
            side = self.side
            image = torch.from_numpy(np.array(picture)).float()
            image = image[None].expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1)
            image = F.interpolate(image[None], size=(side, side), mode="bilinear", antialias=True)[
                0
            ]
            label = F.interpolate(
                torch.from_numpy(np.array(labels)).float()[None, None],
                size=(side, side),
                mode="nearest-exact",
            )[0, 0]
            self._cache[name] = (image.round().clamp(0, 255).to(torch.uint8), label.to(torch.uint8))
        return self._cache[name]

    def _pick(self, chosen: PackedSet, n: int) -> list[tuple[Tensor, Tensor]]:
        keys = list(chosen.train)
        n = min(n, len(keys))  # a picture among its own references would be too easy
        if self.rng.random() < 0.5 and len(keys) > n:  # by similarity, as inference draws them
            pool = [self.picture(chosen, "train", k) for k in keys]
            thumbs = torch.stack(
                [F.adaptive_avg_pool2d(p.float().mean(0)[None], 8).flatten() for p, _ in pool]
            )
            thumbs = F.normalize(thumbs - thumbs.mean(1, keepdim=True), dim=1)
            anchor = int(self.rng.integers(len(keys)))
            noise = 0.1 * torch.rand(len(keys), generator=self.generator)
            order = (thumbs @ thumbs[anchor] + noise).argsort(descending=True)[:n]
            return [pool[i] for i in order.tolist()]
        picks = self.rng.choice(len(keys), size=n, replace=False)
        return [self.picture(chosen, "train", keys[i]) for i in picks]

    def _real(self, chosen: PackedSet, n: int) -> Task:
        pairs = self._pick(chosen, n)
        images = torch.stack([p for p, _ in pairs]).float() / 255
        values = torch.stack([v for _, v in pairs]).long()
        present = [v for v in chosen.labels if bool((values == v).any())]
        labels = self._relabel(values, present)
        color = bool((images[:, 0] - images[:, 1]).abs().max() > 0.02)
        return Task(images, labels, float(self.rng.random()), color, chosen.name)

    def _relabel(self, values: Tensor, present: list[int]) -> Tensor:
        """Some of the labels, sometimes merged, sometimes turned inside out."""
        self.rng.shuffle(present)
        n = min(len(present), 1 + int(self.rng.integers(self.MAX_LABELS)))
        labels = torch.zeros_like(values)
        for i, value in enumerate(present[:n]):
            labels[values == value] = i + 1
        if len(present) > n and self.rng.random() < 0.3:  # a union
            for value in present[n : n + int(self.rng.integers(1, len(present) - n + 1))]:
                labels[values == value] = 1
        if n == 1 and self.rng.random() < 0.07:  # the complement
            labels = 1 - labels
        return labels

    # ---- regions of one real picture ------------------------------------------------------------
    def _regions(self, chosen: PackedSet, n: int) -> Task:
        """A picture's own regions of like intensity and place, seen again after warps."""
        keys = list(chosen.train)
        image = (
            self.picture(chosen, "train", keys[int(self.rng.integers(len(keys)))])[0].float() / 255
        )
        side = image.shape[-1]
        levels = int(self.rng.integers(3, 7))
        smooth = _blur(image[None], float(self.rng.uniform(0.5, 3)))[0]
        if self.rng.random() < 0.5:
            field = smooth.mean(0)
            cuts = torch.quantile(field.flatten()[::7], torch.linspace(0, 1, levels + 1)[1:-1])
            regions = torch.bucketize(field.contiguous(), cuts)
        else:  # k-means over color and place: superpixel-like
            line = torch.linspace(-1, 1, side)
            y, x = torch.meshgrid(line, line, indexing="ij")
            spread = float(self.rng.uniform(0.1, 0.6))
            feats = torch.cat([smooth * 2, spread * y[None], spread * x[None]]).flatten(1).T
            centers = feats[
                torch.from_numpy(self.rng.choice(len(feats), 4 * levels, replace=False))
            ]
            for _ in range(3):
                nearest = torch.cdist(feats[::9], centers).argmin(1)
                sums = torch.zeros_like(centers).index_add_(0, nearest, feats[::9])
                counts = torch.bincount(nearest, minlength=len(centers)).clamp_min(1)
                centers = sums / counts[:, None]
            regions = torch.cdist(feats, centers).argmin(1).view(side, side)
        ids, areas = regions.unique(return_counts=True)
        ids = [int(i) for i, a in zip(ids, areas, strict=True) if 0.003 < int(a) / side**2 < 0.5]
        labels = (
            self._relabel(regions[None], ids)
            if ids
            else torch.zeros(1, side, side, dtype=torch.long)
        )
        color = bool((image[0] - image[1]).abs().max() > 0.02)
        return Task(image[None].repeat(n, 1, 1, 1), labels.repeat(n, 1, 1), 0.0, color, "regions")

    # ---- synthetic anatomies ---------------------------------------------------------------------
    def _synthetic(self, n: int) -> Task:
        """Random anatomy, one warp and texture per subject, contrast by task."""
        side = self.size * 5 // 4
        parts = int(self.rng.integers(3, 10))
        anatomy = self._anatomy(side, parts)
        parts = int(anatomy.max()) + 1
        maps = warp(
            anatomy[None].repeat(n, 1, 1)[:, None].float(),
            flow(
                n,
                side,
                self.generator,
                strength=float(self.rng.uniform(0.02, 0.12)),
                cells=int(self.rng.integers(3, 7)),
            ),
            mode="nearest",
        )[:, 0].long()
        for i in range(n):  # some subjects lack a part: a label must be allowed to be absent
            if parts > 2 and self.rng.random() < 0.35:
                maps[i][maps[i] == int(self.rng.integers(1, parts))] = 0
        color = self.rng.random() < 0.25
        channels = 3 if color else 1
        contrast = torch.rand(parts, channels, generator=self.generator)
        own = contrast[None] + float(self.rng.choice([0.02, 0.05, 0.15])) * torch.randn(
            n, parts, channels, generator=self.generator
        )
        images = torch.stack([own[i][maps[i]] for i in range(n)]).permute(0, 3, 1, 2)
        texture = torch.zeros_like(images)
        for cells in self.rng.choice([8, 16, 32, 64, 128], size=2, replace=False):
            texture += noise(n, channels, side, int(cells), self.generator)
        roughness = torch.rand(parts, generator=self.generator) * float(
            self.rng.uniform(0.02, 0.15)
        )
        images = images + texture * roughness[maps][:, None]
        images = _blur(images, float(self.rng.uniform(0.3, 1.6)))
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = ((images - low) / (high - low + 1e-6)).expand(n, 3, side, side)
        candidates = [v for v in range(1, parts) if bool((maps == v).any())]
        labels = self._relabel(maps, candidates)
        return Task(images.contiguous(), labels, float(self.rng.random()), bool(color), "synthetic")

    def _anatomy(self, side: int, parts: int) -> Tensor:
        kind = self.rng.random()
        line = torch.linspace(-1, 1, side)
        y, x = torch.meshgrid(line, line, indexing="ij")
        if kind < 0.4:  # territories of smooth noise inside a body
            fields = noise(1, parts, side, int(self.rng.integers(3, 9)), self.generator)[0]
            anatomy = fields.argmax(0)
            if self.rng.random() < 0.7:
                body = (x / self.rng.uniform(0.6, 0.95)) ** 2 + (
                    y / self.rng.uniform(0.6, 0.95)
                ) ** 2 < 1
                anatomy = torch.where(body, anatomy + 1, 0)
            return anatomy
        anatomy = torch.zeros(side, side, dtype=torch.long)
        if kind < 0.8:  # ellipses, some of them nested rings
            value = 0
            if self.rng.random() < 0.7:
                value = 1
                anatomy[
                    (x / self.rng.uniform(0.6, 0.95)) ** 2 + (y / self.rng.uniform(0.6, 0.95)) ** 2
                    < 1
                ] = 1
            while value < parts:
                cx, cy = self.rng.uniform(-0.6, 0.6, 2)
                a, b = self.rng.uniform(0.06, 0.4, 2)
                angle = self.rng.uniform(0, np.pi)
                u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
                v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
                radius = (u / a) ** 2 + (v / b) ** 2
                for ring in range(int(self.rng.integers(1, 4))):
                    value += 1
                    anatomy[radius < (1 - 0.3 * ring) ** 2] = value
            return anatomy
        if kind < 0.9:  # tubes: level sets of noise, thin
            field = noise(1, 2, side, int(self.rng.integers(3, 8)), self.generator)[0]
            width = float(self.rng.uniform(0.03, 0.15))
            anatomy[field[1] > 0] = 1
            anatomy[field[0].abs() < width] = 2
            return anatomy
        anatomy[noise(1, 1, side, 4, self.generator)[0, 0] > 0.3] = 1  # many small objects
        for _ in range(int(self.rng.integers(8, 40))):
            cx, cy = self.rng.uniform(-0.95, 0.95, 2)
            r = self.rng.uniform(0.02, 0.09)
            kind_of = 2 + int(self.rng.integers(2))
            anatomy[(x - cx) ** 2 + ((y - cy) * self.rng.uniform(0.7, 1.4)) ** 2 < r**2] = kind_of
        return anatomy


def focus(mask: Tensor) -> tuple[float, float, float] | None:
    """Center (x, y) and half side of the square around a mask (H, W), in -1..1; None if empty."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if len(rows) == 0:
        return None
    h, w = mask.shape
    top, bottom = int(rows[0]) * 2 / h - 1, (int(rows[-1]) + 1) * 2 / h - 1
    left, right = int(columns[0]) * 2 / w - 1, (int(columns[-1]) + 1) * 2 / w - 1
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2


def noise(n: int, channels: int, side: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise (n, channels, side, side), about unit variance, features of side / cells px."""
    coarse = torch.randn(n, channels, cells + 3, cells + 3, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic" if cells < 32 else "bilinear")


def flow(n: int, side: int, generator: torch.Generator, *, strength: float, cells: int) -> Tensor:
    """Sampling grid (n, side, side, 2) of a smooth random warp; strength in half image sides."""
    base = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, side, side], align_corners=False)
    return base + strength * noise(n, 2, side, cells, generator).permute(0, 2, 3, 1)


def warp(images: Tensor, grid: Tensor, *, mode: str) -> Tensor:
    """Sample images (n, c, h, w) on a grid of `flow`; outside repeats the border."""
    return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)


def _blur(images: Tensor, sigma: float) -> Tensor:
    radius = max(1, round(2.5 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    line = line / line.sum()
    c = images.shape[1]
    row = line.view(1, 1, 1, -1).expand(c, 1, 1, -1)
    images = F.conv2d(F.pad(images, (radius, radius, 0, 0), mode="replicate"), row, groups=c)
    return F.conv2d(
        F.pad(images, (0, 0, radius, radius), mode="replicate"), row.transpose(2, 3), groups=c
    )
