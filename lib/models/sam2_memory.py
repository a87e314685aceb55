"""From memory rows to what SAM 2 attends to: tokens, and their codes of place and time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.models.sam2_tensors import join_values

POINTER_STEP = 1 / 15  # one frame, in SAM 2's unit for pointers: 15 frames


def memory_tokens(
    module: Any, rows: Tensor, recent: dict[int, Tensor], *, pointer_distance: float | None
) -> tuple[Tensor, Tensor, int]:
    """What the query attends to.

    Spatial memories come first, those of references and then the recent ones, with (S/16)^2 tokens
    each; then the pointers with four tokens each.

    Args:
        module: `SAM2Base`.
        rows: (R, L, numbers) references.
        recent: distance in slices -> (L, numbers).
        pointer_distance: as in `Sam2Options`.

    Returns:
        tokens (T, L, 64), their codes (T, L, 64), and how many tokens are pointers.
    """
    width = module.mem_dim
    grid = module.sam_image_embedding_size
    references = len(rows)
    rows = torch.cat([rows, *(memory[None] for memory in recent.values())]).float()
    memories, count = rows.shape[:2]
    maps = rows[..., : width * grid**2].reshape(memories, count, width, -1)
    tokens = [maps.permute(0, 3, 1, 2).flatten(0, 1)]

    place = module.memory_encoder.position_encoding(maps.new_empty(1, width, grid, grid))
    place = place.flatten(2).permute(2, 0, 1)  # (P, 1, 64)
    # the code of a frame at distance d has index d - 1, that of conditioning frames is the last
    slots = [module.num_maskmem - 1] * references + [distance - 1 for distance in recent]
    codes = [torch.cat([place + module.maskmem_tpos_enc[slot] for slot in slots])]

    pointer_tokens = 0
    if pointer_distance is not None:
        distances = [pointer_distance] * references
        distances += [distance * POINTER_STEP for distance in recent]
        pointers = join_values(rows[..., width * grid**2 : -1])
        pieces = pointers.shape[-1] // width
        pointers = pointers.reshape(memories, count, pieces, width)
        tokens.append(pointers.permute(0, 2, 1, 3).flatten(0, 1))
        times = _pointer_codes(module, distances)
        codes.append(times.repeat_interleave(pieces, dim=0)[:, None])
        pointer_tokens = memories * pieces
    return torch.cat(tokens), torch.cat(codes).expand(-1, count, -1), pointer_tokens


def _pointer_codes(module: Any, distances: Sequence[float]) -> Tensor:
    """Time codes (R, 64) of object pointers at distances (R,) in units of 15 frames."""
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    if not module.add_tpos_enc_to_obj_ptrs:  # SAM 2.0
        return torch.zeros(len(distances), module.mem_dim, device=module.device)
    width = module.hidden_dim if module.proj_tpos_enc_in_obj_ptrs else module.mem_dim
    times = torch.tensor(distances, device=module.device)
    codes: Tensor = module.obj_ptr_tpos_proj(get_1d_sine_pe(times, dim=width))
    return codes
