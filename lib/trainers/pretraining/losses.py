"""MatchSeg's three losses (Dice, cross entropy, focal), labels competing, and two for the heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.models.network import Output


def soft_dice(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Dice of (..., H, W) probabilities and masks -> (...)."""
    overlap = (probabilities * masks).sum((-2, -1))
    total = (probabilities + masks).sum((-2, -1))
    return (2 * overlap + 1) / (total + 1)


def episode_loss(output: Output, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of B queries, masks (B, L, S, S) 0/1 floats.

    Labels and background compete: the class probabilities are a softmax over the scores with
    background at zero, which is what inference decides by. Returns the loss and the mean soft Dice
    of the labels that are there, detached.
    """
    number = torch.arange(1, masks.shape[1] + 1, device=masks.device)[:, None, None]
    target = (masks * number).amax(1).long()  # (B, S, S), 0 is background
    scores = torch.cat([torch.zeros_like(output.scores[:, :1]), output.scores], 1)
    logs = F.log_softmax(scores, dim=1)
    picked = logs.gather(1, target[:, None])[:, 0]
    cross_entropy = -picked.mean()
    focal = -((1 - picked.exp()) ** 2 * picked).mean()
    probabilities = logs[:, 1:].exp()
    dice = soft_dice(probabilities, masks)
    present = masks.amax((2, 3)) > 0
    n_present = present.sum().clamp_min(1)
    # What is painted of an absent label counts as well, softened by an area of 200 pixels: without
    # it the network learns to paint whatever might be there.
    painted = probabilities.sum((2, 3)) / (probabilities.sum((2, 3)) + 200)
    dice_loss = torch.where(present, 1 - dice, painted).mean()

    # The vote by itself, every head: it is the floor that the decoder stands on.
    small = F.avg_pool2d(masks, 8)
    wanted = torch.cat([small, 1 - small.sum(1, keepdim=True)], 1)[:, None]  # (B, 1, L + 1, ..)
    vote_ce = -(wanted * (output.votes + 1e-3).log()).sum(2).mean()
    vote_dice = (1 - soft_dice(output.votes[:, :, :-1], small[:, None])).mean(1)
    vote_loss = vote_ce + (vote_dice * present).sum() / n_present

    # Absence is rare in the episodes and matters as much as presence.
    rarity = torch.where(present, 1.0, 4.0)
    presence = F.binary_cross_entropy_with_logits(output.presence, present.float(), weight=rarity)
    with torch.no_grad():  # argmax is slow across a strided axis
        best = output.scores.amax(1, keepdim=True).clamp_min(0)
        won = ((output.scores == best) & (best > 0)).float()
    achieved = soft_dice(won, masks).detach()
    quality = (
        F.binary_cross_entropy_with_logits(output.quality, achieved, reduction="none") * present
    ).sum() / n_present
    loss = dice_loss + cross_entropy + focal + 0.3 * vote_loss + 0.2 * presence + 0.1 * quality
    return loss, ((dice * present).sum() / n_present).detach()
