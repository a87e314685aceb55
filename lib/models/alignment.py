"""Where a reference's structures would lie in the query's picture.

Place counts in the vote, and for organs in scans taken alike it counts much; but a heart lies here
in one patient and there in the next. So before places are compared, the surroundings of what is
labelled in a reference are looked for in the query: block matching, as for motion in films, on
descriptors instead of grey values. Half of the evidence comes from all labels together, half from
around each cell, so that two kidneys may move apart. No training, and little time beside the vote.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FARTHEST = 5 / 16  # of the picture's side; what lies farther off is not looked for
WINDOW = 9 / 16  # side of the surroundings of one cell
LABELLED = 5 / 16  # width of the band around labels that counts in full
ELSEWHERE = 0.02  # what all other cells count
SHARPNESS = 60.0  # of the choice among displacements, in cosines
STAYING = 1.0  # price of a displacement, by its squared length in sides


def displacements(query: Tensor, references: Tensor, shares: Tensor) -> Tensor:
    """How far each cell of R references is from where the query shows the like.

    Args:
        query: (C, side, side) descriptors.
        references: (R, P, C) descriptors, P = side^2.
        shares: (R, P) share of each cell that is labelled.

    Returns:
        (R, P, 2) as (x, y), to be added to places in -1..1; zero for a reference that shows no
        label.
    """
    side = query.shape[-1]
    maps = references.float().mT.unflatten(-1, (side, side))
    theirs = _marked(F.avg_pool2d(maps, 2))  # (R, C, s, s)
    mine = _marked(F.avg_pool2d(query.float(), 2)[None])
    s = side // 2
    labelled = F.avg_pool2d(shares.float().view(-1, 1, side, side), 2)
    band = _odd(LABELLED * s)
    counts = F.max_pool2d(labelled, band, 1, band // 2) + ELSEWHERE  # (R, 1, s, s)
    far = round(FARTHEST * s)
    line = torch.arange(-far, far + 1, device=query.device, dtype=torch.float32)
    dy, dx = (d.flatten() for d in torch.meshgrid(line, line, indexing="ij"))  # (D,)
    # alike[r, d, y, x]: cosine of the reference's cell with the query's cell that lies d off, or 0
    cosines = theirs.flatten(2).mT @ mine[0].flatten(1)  # (R, s * s, s * s)
    cells = torch.arange(s, device=query.device)
    y, x = cells[:, None, None] + dy.long(), cells[None, :, None] + dx.long()  # (s, 1 or s, D)
    inside = (y >= 0) & (y < s) & (x >= 0) & (x < s)
    there = torch.where(inside, y * s + x, 0).flatten(0, 1)  # (s * s, D)
    alike = cosines.gather(2, there.expand(len(cosines), -1, -1)) * inside.flatten(0, 1)
    alike = alike.mT.unflatten(-1, (s, s))
    weighed = alike * counts
    overall = weighed.sum((2, 3), keepdim=True) / counts.sum((2, 3), keepdim=True)
    window = _odd(WINDOW * s)
    around = _mean_around(weighed, window) / _mean_around(counts, window)
    price = STAYING * (dx.square() + dy.square()) / s**2
    scores = (overall + around) / 2 - price[:, None, None]
    chances = (SHARPNESS * scores).softmax(1)  # (R, D, s, s)
    offsets = torch.stack([dx, dy], 1) * (2 / s)  # (D, 2)
    moved = torch.einsum("rdyx,dk->rkyx", chances, offsets)
    moved = moved * (labelled.amax((1, 2, 3)) > 0)[:, None, None, None]
    return F.interpolate(moved, size=(side, side), mode="bilinear").flatten(2).mT


def _marked(maps: Tensor) -> Tensor:
    """Unit vectors of what tells the cells of a picture apart, (N, C, s, s)."""
    maps = F.normalize(maps, dim=1)
    return F.normalize(maps - maps.mean((2, 3), keepdim=True), dim=1)


def _mean_around(maps: Tensor, window: int) -> Tensor:
    return F.avg_pool2d(maps, window, 1, window // 2, count_include_pad=False)


def _odd(cells: float) -> int:
    """The odd number nearest to so many cells, at least 1."""
    return 2 * max(0, round((cells - 1) / 2)) + 1
