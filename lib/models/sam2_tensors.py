"""What goes into SAM 2 and what is kept of it: pictures, masks, memory rows."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.types import FloatArray

LAYOUT = "stretched, ImageNet statistics; features, pointer in 3 parts, flag"  # of inputs and rows
POINTER_PARTS = 3  # bfloat16 numbers that carry one float32 of the pointer without loss
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in SAM 2's training
STD = (0.229, 0.224, 0.225)


def picture(image: FloatArray, *, size: int) -> Tensor:
    """Grey (H, W) or RGB (H, W, 3) in 0..1 -> (3, S, S), stretched and normalised."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    pixels = pixels[None].expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(
            pixels[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True
        )[0]
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def square_masks(masks: Tensor, *, size: int) -> Tensor:
    """Masks (L, H, W) bool -> (L, 1, S, S) float 0/1, as `add_new_mask` resizes them.

    A structure thinner than the new grid would vanish, and its slice would become an example of
    its absence. Such a mask is cut at half of its own maximum instead of at 0.5.
    """
    if masks.shape[-2:] == (size, size):
        return masks[:, None].float()
    soft = F.interpolate(
        masks[:, None].float(),
        size=(size, size),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    peak = soft.amax(dim=(-2, -1), keepdim=True)
    cut = torch.where(peak < 0.5, peak / 2, 0.5)
    return ((soft >= cut) & (peak > 0)).float()


def split_values(values: Tensor) -> list[Tensor]:
    """Values as a sum of three bfloat16 numbers each, which carry all 24 bits of a float32."""
    parts = []
    for _ in range(POINTER_PARTS):
        part = values.bfloat16().float()
        parts.append(part)
        values = values - part
    return parts


def join_values(parts: Tensor) -> Tensor:
    """Parts (..., 3 N) of `split_values`, one after the other -> values (..., N)."""
    return parts.unflatten(-1, (POINTER_PARTS, -1)).sum(dim=-2)


def group_labels(known: Tensor, shown: Tensor) -> dict[tuple[bool, ...], list[int]]:
    """Labels that at least one reference shows, by which references know them.

    Args:
        known: (R, L) bool.
        shown: (L,) bool.
    """
    groups: dict[tuple[bool, ...], list[int]] = {}
    for label in torch.nonzero(shown).flatten().tolist():
        groups.setdefault(tuple(known[:, label].tolist()), []).append(label)
    return groups
