"""U-Nets to compare with, trained on the very cases, split and budget that MatchSeg is given.

`unet` is MONAI's U-Net; `dynunet` is MONAI's DynUNet as nnU-Net would plan it for 256 x 256
pictures, at whatever size it is trained (seven stages, instance norm, leaky ReLU, deep supervision,
SGD with Nesterov momentum and a polynomial rate). Their augmentation is MatchSeg's ("same") or the
U-Nets' own habit ("plain").
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet, UNet
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
)
from torch import Tensor, nn

from lib.evaluation.metrics import dice
from lib.imaging.io import read_image
from lib.imaging.slices import cut, through_plane_axis
from lib.models.matchseg import standardize
from lib.trainers.pretraining.episodes import EpisodeMaker
from lib.trainers.pretraining.tasks import Task
from lib.trainers.site.packing import PackedCase, as_tensor
from lib.types import IntArray

SUPERVISED = 3  # lower levels of the DynUNet that are asked, too


@dataclass(frozen=True)
class BaselinePlan:
    """Budget and batch; the same figures as in `SitePlan`."""

    minutes: float
    steps: int
    images: int
    size: int
    seed: int
    device: str
    augmentation: str = "same"
    average: float = 0.98


def make_network(kind: str, channels: int) -> nn.Module:
    """Network with `channels` outputs, background first."""
    if kind == "unet":
        return UNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=channels,
            channels=(32, 64, 128, 256, 512),
            strides=(2, 2, 2, 2),
            num_res_units=2,
        )
    stages = 7
    return DynUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=channels,
        kernel_size=[3] * stages,
        strides=[1] + [2] * (stages - 1),
        upsample_kernel_size=[2] * (stages - 1),
        filters=[32, 64, 128, 256, 512, 512, 512],
        deep_supervision=True,
        deep_supr_num=SUPERVISED,
    )


class Batches:
    """The n-th batch of augmented slices; the same for the same seed."""

    def __init__(self, cases: Sequence[PackedCase], names: Sequence[str], plan: BaselinePlan):
        self._cases, self._names, self._plan = cases, names, plan
        self._slices = [(c, i) for c, case in enumerate(cases) for i in range(len(case))]
        turn = float(np.pi / 6)
        keys, both = ["image"], ["image", "label"]
        self._plain = Compose(
            [
                RandFlipd(both, prob=0.5, spatial_axis=1),
                RandAffined(
                    both,
                    prob=0.5,
                    rotate_range=turn,
                    scale_range=0.3,
                    translate_range=plan.size // 12,
                    mode=["bilinear", "nearest"],
                    padding_mode="border",
                ),
                RandGaussianNoised(keys, prob=0.15, std=0.1),
                RandGaussianSmoothd(keys, prob=0.2),
                RandAdjustContrastd(keys, prob=0.3, gamma=(0.7, 1.5)),
            ]
        )

    def make(self, number: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) standardized and labels (B, S, S), 0 is background."""
        rng = np.random.default_rng((self._plan.seed, number))
        some = min(self._plan.images, len(self._slices))
        picks = [self._slices[i] for i in rng.choice(len(self._slices), some, replace=False)]
        images = torch.stack([as_tensor(self._cases[c].picture(i)) for c, i in picks])
        labels = torch.stack([torch.from_numpy(self._labels(c, i)) for c, i in picks])
        if self._plan.augmentation == "same":
            color = bool((images[:, 0] - images[:, 1]).abs().max() > 0.02)
            task = Task(images, labels.long(), 0.3 + 0.7 * float(rng.random()), color, "")
            maker = EpisodeMaker(size=self._plan.size, seed=int(rng.integers(2**31)), one_place=1.0)
            made = maker.make(task, most_supports=1, queries=1)
            number_of = torch.arange(1, made.masks.shape[1] + 1)[None, :, None, None]
            return made.images, (made.masks * number_of).amax(1).long()
        self._plain.set_random_state(int(rng.integers(2**31)))
        side = (self._plan.size, self._plan.size)
        small = F.interpolate(images, size=side, mode="bilinear", antialias=True)
        near = F.interpolate(labels[:, None].float(), size=side, mode="nearest-exact")
        done = [self._plain({"image": i, "label": m}) for i, m in zip(small, near, strict=True)]
        stacked = torch.stack([torch.as_tensor(one["image"]) for one in done])
        return standardize(stacked), torch.stack(
            [torch.as_tensor(one["label"])[0] for one in done]
        ).long()

    def _labels(self, case: int, row: int) -> np.ndarray:
        return on_names(self._cases[case], row, self._names)


def on_names(case: PackedCase, row: int, names: Sequence[str]) -> np.ndarray:
    """(S, S) uint8, value v is `names[v - 1]`."""
    lookup = np.zeros(len(case.labels) + 1, np.uint8)
    for value, name in enumerate(names, start=1):
        if name in case.labels:
            lookup[case.labels.index(name) + 1] = value
    return lookup[case.label_map(row)]


def fit_baseline(
    kind: str,
    training: Sequence[PackedCase],
    validation: Sequence[PackedCase],
    names: Sequence[str],
    plan: BaselinePlan,
) -> tuple[nn.Module, int]:
    """Train until the minutes are spent; the weights that did best on the validation cases.

    Returns:
        the network and the number of steps.
    """
    torch.manual_seed(plan.seed)
    device = torch.device(plan.device)
    net = make_network(kind, len(names) + 1).to(device)
    averaged = copy.deepcopy(net)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
    if kind == "dynunet":
        optimizer = torch.optim.SGD(
            net.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5
        )
    first = optimizer.param_groups[0]["lr"]
    batches = Batches(training, names, plan)
    best, kept, step, start = -1.0, copy.deepcopy(net.state_dict()), 0, time.monotonic()
    while (spent := time.monotonic() - start) < 60 * plan.minutes:
        net.train()
        for _ in range(plan.steps):
            done = min(1.0, (time.monotonic() - start) / (60 * plan.minutes))
            if done >= 1:
                break
            optimizer.param_groups[0]["lr"] = first * max(0.01, (1 - done) ** 0.9)
            images, labels = batches.make(step)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                found = net(images.to(device))
            target = labels[:, None].to(device)
            levels = found.unbind(1) if found.ndim == 5 else (found,)
            weights = [0.5**n for n in range(len(levels))]
            loss = sum(
                w * loss_of(level.float(), target) for w, level in zip(weights, levels, strict=True)
            ) / sum(weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 12)
            optimizer.step()
            step += 1
            keep = min(plan.average, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, now in zip(averaged.parameters(), net.parameters(), strict=True):
                    mean.lerp_(now, 1 - keep)
        del spent
        score = _validate(averaged, validation, names, plan)
        if score > best:
            best, kept = score, copy.deepcopy(averaged.state_dict())
    net.load_state_dict(kept)
    return net.eval(), step


@torch.inference_mode()
def _validate(
    net: nn.Module, cases: Sequence[PackedCase], names: Sequence[str], plan: BaselinePlan
) -> float:
    net.eval()
    scores = []
    for case in cases:
        pictures = [as_tensor(case.picture(row)) for row in range(len(case))]
        found = _argmax(net, pictures, plan.size, plan.device, [p.shape[-2:] for p in pictures])
        truth = np.stack([on_names(case, row, names) for row in range(len(case))])
        each = [dice(np.stack(found) == v, truth == v) for v in range(1, len(names) + 1)]
        if not np.all(np.isnan(each)):
            scores.append(float(np.nanmean(each)))
    return float(np.mean(scores)) if scores else 0.0


def predict(net: nn.Module, path: Path, *, size: int, device: str) -> IntArray:
    """Segment an image slice by slice -> (N, H, W), value v is the v-th label."""
    image = read_image(path)
    pictures = []
    for picture in cut(image, through_plane_axis(image)):
        tensor = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))
        pictures.append(tensor.expand(3, -1, -1) if tensor.ndim == 2 else tensor.permute(2, 0, 1))
    return np.stack(_argmax(net, pictures, size, device, [p.shape[-2:] for p in pictures]))


@torch.inference_mode()
def _argmax(
    net: nn.Module,
    pictures: Sequence[Tensor],
    size: int,
    device: str,
    shapes: Sequence[tuple[int, int]],
) -> list[IntArray]:
    found = []
    for picture, shape in zip(pictures, shapes, strict=True):
        small = F.interpolate(picture[None], size=(size, size), mode="bilinear", antialias=True).to(
            device
        )
        logits = net(standardize(small)).float()
        full = F.interpolate(logits, size=tuple(shape), mode="bilinear", align_corners=False)
        found.append(full[0].argmax(0).cpu().numpy().astype(np.int32))
    return found
