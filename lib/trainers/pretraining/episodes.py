"""From a task to an episode: augmentation of the task and of each image, choice of supports."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.models.matchseg import standardize
from lib.trainers.pretraining.tasks import Task, focus, noise, warp


@dataclass(frozen=True, eq=False)
class Episode:
    """N images; the first Q are queries, each with its own supports among the others.

    Attributes:
        images: (N, 3, S, S) standardized.
        masks: (N, L, S, S) 0/1 floats.
        supports: (Q, R) indices of each query's references.
        known: (Q, R, L) bool.
        family: name for the log.
    """

    images: Tensor
    masks: Tensor
    supports: Tensor
    known: Tensor
    family: str


class EpisodeMaker:
    """Augments tasks; seeded.

    Args:
        size: side of the pictures in pixels.
        seed: of everything.
        one_place: share of the tasks whose contrast varies as it does within one place, in its own
            modalities, and does not become another modality's.
    """

    def __init__(self, *, size: int, seed: int, one_place: float = 0.0):
        self.size = size
        self.one_place = one_place
        self.rng = np.random.default_rng(seed + 1)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def make(self, task: Task, *, most_supports: int, queries: int) -> Episode:
        """Warp and re-tone a task; sometimes some supports are empty or unknown for a label."""
        n = task.images.shape[0]
        images, labels = task.images, task.labels
        if self.rng.random() < 0.5:  # the task as such may be mirrored or turned
            images, labels = images.flip(-1), labels.flip(-1)
        if self.rng.random() < 0.2:
            images, labels = images.flip(-2), labels.flip(-2)
        if self.rng.random() < 0.15:
            turns = int(self.rng.integers(1, 4))
            images, labels = images.rot90(turns, (-2, -1)), labels.rot90(turns, (-2, -1))
        grid = self._grid(n, 1 - task.rigid)
        if self.rng.random() < 0.25:
            grid = self._closer(grid, labels)
        images = warp(images, grid, mode="bilinear")
        labels = warp(labels[:, None].float(), grid, mode="nearest")[:, 0].long()
        if self.rng.random() < 0.5:
            images, labels = self._erase(images, labels)
        images = self._tone(images, color=task.color)
        n_labels = max(int(labels.max()), 1)
        masks = F.one_hot(labels, n_labels + 1)[..., 1:].permute(0, 3, 1, 2).float()
        r = int(self.rng.integers(1, min(most_supports, n - 1) + 1))
        queries = min(queries, n)
        others = torch.stack(
            [
                torch.tensor([j for j in range(n) if j != i])[
                    torch.randperm(n - 1, generator=self.generator)[:r]
                ]
                for i in range(queries)
            ]
        )
        known = torch.ones(queries, r, n_labels, dtype=torch.bool)
        if r > 1 and n_labels > 1 and self.rng.random() < 0.1:
            known = torch.rand(known.shape, generator=self.generator) < 0.7
            known[:, 0] = True
        return Episode(standardize(images), masks, others, known, task.family)

    def _grid(self, n: int, strength: float) -> Tensor:
        """Rotation, scale, shift, aspect, a mirror now and then, and a smooth warp."""
        side, g = self.size, self.generator

        def spread(scale: float) -> Tensor:
            return (torch.rand(n, generator=g) * 2 - 1) * scale

        angle = spread(0.06 + 0.5 * strength)
        zoom = 0.85 * (1 + spread(0.05 + 0.25 * strength))
        aspect = 1 + spread(0.03 + 0.12 * strength)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 0, 1] = cos * aspect, -sin * aspect
        theta[:, 1, 0], theta[:, 1, 1] = sin / aspect, cos / aspect
        theta[:, 0, 2], theta[:, 1, 2] = (
            spread(0.05 + 0.2 * strength),
            spread(0.05 + 0.2 * strength),
        )
        if strength > 0.5 and self.rng.random() < 0.2:
            mirrored = torch.rand(n, generator=g) < 0.5
            theta[mirrored, 0] = -theta[mirrored, 0]
        grid = F.affine_grid(theta, [n, 1, side, side], align_corners=False)
        bend = (0.01 + 0.05 * strength) * noise(n, 2, side, 4, g).permute(0, 2, 3, 1)
        return grid + bend

    def _closer(self, grid: Tensor, labels: Tensor) -> Tensor:
        """Move the sampling grid (N, S, S, 2) to where the labels are: another field of view.

        One margin for the task, a little jitter for each image; an image without labels is cut
        where another one has them.
        """
        g = self.generator
        boxes = [focus(mask) for mask in labels > 0]
        found = [b for b in boxes if b is not None]
        if not found:
            return grid
        filled = [found[i % len(found)] if b is None else b for i, b in enumerate(boxes)]
        center = torch.tensor([[x, y] for x, y, _ in filled])
        half = torch.tensor([h for _, _, h in filled])
        n = len(half)
        margin = float(self.rng.uniform(1.2, 2.2))
        half = half * margin * (1 + 0.15 * (torch.rand(n, generator=g) * 2 - 1))
        half = half.clamp(0.15, 1)
        center = center + 0.15 * half[:, None] * torch.randn(n, 2, generator=g)
        center = center.clamp(half[:, None] - 1, 1 - half[:, None])  # stay inside the picture
        return center[:, None, None] + half[:, None, None, None] * grid

    def _erase(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Paint over a label in some of the images, so that it is absent amid its usual neighbors.

        The gap takes the mean of what lies around it, and grain. Small sets hold few slices on
        which a structure is missing, and a network that never met one paints it everywhere.
        """
        images, labels = images.clone(), labels.clone()
        for i in range(len(images)):
            value = int(self.rng.integers(1, max(int(labels.max()), 1) + 1))
            gap = labels[i] == value
            if self.rng.random() > 0.4 or not bool(gap.any()) or float(gap.float().mean()) > 0.4:
                continue
            near = F.max_pool2d(gap[None].float(), 5, 1, 2)  # the rim, too, tells of what was there
            keep = 1 - near
            width, size = int(self.rng.integers(2, 6)) * 2 + 1, near.shape[-2:]
            coarse = F.avg_pool2d(torch.cat([keep, images[i] * keep]), 4)
            coarse = F.avg_pool2d(coarse, width, 1, width // 2, count_include_pad=False)
            wide = F.interpolate(coarse[None], size=size, mode="bilinear")[0]
            total, around = wide[:1], wide[1:] / wide[:1].clamp_min(1e-3)
            whole = (images[i] * keep).mean((1, 2), keepdim=True) / keep.mean().clamp_min(1e-3)
            around = torch.where(total > 0.02, around, whole)
            grain = float(self.rng.uniform(0, 0.08)) * torch.randn(
                1, *near.shape[1:], generator=self.generator
            )
            images[i] = torch.where(near > 0, around + grain, images[i])
            labels[i][gap] = 0
        return images, labels

    def _tone(self, images: Tensor, *, color: bool) -> Tensor:
        """Contrast by task, then a little by image."""
        share = self.one_place  # 0 and 1 need no draw, and change nothing of what a seed gives
        one_place = share >= 1 or (share > 0 and self.rng.random() < share)
        if not one_place:
            images = self._another_modality(images, color=color)
        n, g, rng = images.shape[0], self.generator, self.rng
        varied = float(rng.uniform(0.05, 0.3 if one_place else 0.5))
        gamma = torch.exp((torch.rand(n, 1, 1, 1, generator=g) * 2 - 1) * varied)
        images = images.clamp(1e-4, 1) ** gamma
        if rng.random() < 0.4:  # bias field
            images = images * (1 + varied * 0.4 * noise(n, 1, images.shape[-1], 2, g))
        if rng.random() < 0.4:
            grain = float(rng.uniform(0, 0.05 if one_place else 0.1))
            images = images + grain * torch.randn((n, 1, *images.shape[2:]), generator=g)
        if not one_place and rng.random() < 0.2:
            factor = int(rng.integers(2, 4))
            small = F.avg_pool2d(images, factor)
            images = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
        return images

    def _another_modality(self, images: Tensor, *, color: bool) -> Tensor:
        """Grey or other colors, inverted, or along a random curve; all images of the task alike."""
        g, rng = self.generator, self.rng
        if color and rng.random() < 0.3:
            weights = torch.rand(3, generator=g)
            images = (
                (images * (weights / weights.sum())[None, :, None, None])
                .sum(1, keepdim=True)
                .expand(-1, 3, -1, -1)
            )
        elif color and rng.random() < 0.4:
            images = images[:, torch.randperm(3, generator=g)]
        if rng.random() < 0.2:
            images = 1 - images
        if rng.random() < 0.2:  # a random monotone-by-pieces curve
            knots = torch.rand(6, generator=g)
            position = images.clamp(0, 1) * 4.999
            low = position.long()
            images = knots[low] + (knots[low + 1] - knots[low]) * (position - low)
        return images
