"""The `sam2` reference segmenter: SAM 2's memory, used for references that have no time.

After "Retrieval-augmented few-shot medical image segmentation with foundation models" (Zhao et al.,
arXiv 2408.08813): a reference's image features and mask go through SAM 2's memory encoder; the
query's features attend to these memories and SAM 2's decoder draws the mask, without any prompt.
SAM 2 expects frames of a video, and a reference is no frame. What is done about that, and why:

- **Every reference is a conditioning memory.** All receive the same time code (t_pos 0), as
  frames that a user has marked in a video; the six slots of recent frames stay empty. Any number
  of references may be used.
- **Their order is of no consequence.** SAM 2.1's object pointers carry a signed distance in time;
  here all references have one and the same (`POINTER_STEP`, that of the frame before the
  query in a clip of 16 frames or more). Leaving pointers out would be as free of order, but in SAM
  2.0 the pointer alone says that a reference is empty, so they stay.
- **An empty mask is a true negative**: the memory gets `no_obj_embed_spatial` (2.1) and the pointer
  becomes `no_obj_ptr`. A reference that was not annotated for a label is left out for that label.
  If none of a label's references shows it there is nothing to segment by: the label is
  reported as absent without asking the network (SAM 2.0 would invent a mask).
- **`no_mem_embed` is not added**: it means "no memory at all", which never holds here.
- **Real time only where there is some**: `neighbors`, memories of the slices next to the query in
  the same volume, take the slots t_pos 6..1 of the last frames.
- **Absence is said, not hidden.** SAM 2 overwrites all logits with -1024 where its object score
  is not positive. So does this, by default, but `Prediction.presence` carries the score as a
  probability, `quality` the expected Dice from the predicted IoU, and `absence_threshold` moves
  or (0) removes the gate.
- **The reference's mask goes into the memory as it is**, as in SAM 2's training. The package's
  video predictor blurs it through stride 4 first, which costs small structures; `blur_masks` does
  the same.

A memory row is 64 x (S/16)^2 features, the pointer and a flag, in bfloat16, to which the video
predictor rounds memories too: 0.5 MiB a label at 1,024 pixels, 0.13 MiB at 512.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import LabelError
from lib.models.devices import choose_device, in_batches
from lib.models.protocol import AS_TRAINED
from lib.models.sam2_memory import POINTER_STEP, memory_tokens
from lib.models.sam2_network import STRIDE, Sam2Network, load_network, random_network
from lib.models.sam2_tensors import (
    LAYOUT,
    POINTER_PARTS,
    group_labels,
    picture,
    split_values,
    square_masks,
)
from lib.types import Example, Features, FloatArray, Memory, Prediction, Study

logger = logging.getLogger(__name__)

ABSENT_SCORE = -1024.0  # what SAM 2 writes over the logits of an absent object
PIXELS_AT_ONCE = 4 * 1024**2  # images encoded together, and masks remembered together
TOKENS_AT_ONCE = 400_000  # memory tokens x labels attended to together: about 2 GB
OUT_OF_MEMORY_HINT = (
    "Use fewer references (k), working size 512, a smaller SAM 2 variant, or device=cpu."
)


@dataclass(frozen=True)
class Sam2Options:
    """How SAM 2's memory is used; see the module's text for the reasons.

    Attributes:
        pointer_distance: the distance in time of all references' object pointers, in units of 15
            frames; None leaves pointers out. 1.0 is what tracking uses in a clip of two frames.
        absence_threshold: a label whose presence is not above this gets scores of -1024.
        blur_masks: pass reference masks through stride 4, as `SAM2VideoPredictor` does.
        memory_dtype: of stored memories.
        half: compute under bfloat16 autocast; None: on CUDA only.
    """

    pointer_distance: float | None = POINTER_STEP
    absence_threshold: float = 0.5
    blur_masks: bool = False
    memory_dtype: torch.dtype = torch.bfloat16
    half: bool | None = None


class Sam2Segmenter:
    """Implements `lib.models.protocol.ReferenceSegmenter` with SAM 2 or 2.1.

    One forward pass runs at a time: requests of other threads wait for it, so that the memory in
    use stays that of one pass.

    Args:
        network: of `sam2_network.load_network` or `.random_network`.
        device: as for `choose_device`.
        options: how the memory is used.
    """

    name = "sam2"

    def __init__(
        self,
        network: Sam2Network,
        *,
        device: str | None = None,
        options: Sam2Options | None = None,
    ) -> None:
        self.options = options or Sam2Options()
        self.device = choose_device(device)
        self.size = network.size
        self.variant = network.variant
        self._module = network.module.to(self.device)
        self._half = self.device.type == "cuda" if self.options.half is None else self.options.half
        self._lock = threading.RLock()
        self._grid = network.size // STRIDE
        self._feature_numbers = self._module.mem_dim * self._grid**2
        self._encode_batch = self._remember_batch = max(1, PIXELS_AT_ONCE // network.size**2)
        self._token_budget = TOKENS_AT_ONCE
        # what shapes a stored memory; pointer distance and threshold act on the query alone
        kept_as = (self.options.blur_masks, str(self.options.memory_dtype))
        recipe = (network.variant, network.digest, network.size, LAYOUT, kept_as)
        self.fingerprint = "sam2-" + hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]

    @classmethod
    def load(
        cls,
        variant: str,
        checkpoint: Path,
        *,
        size: int = 1024,
        device: str | None = None,
        options: Sam2Options | None = None,
    ) -> "Sam2Segmenter":
        """Load a variant ("sam2.1-tiny" .. "sam2-large") from its checkpoint."""
        return cls(load_network(variant, checkpoint, size=size), device=device, options=options)

    @classmethod
    def random(
        cls,
        variant: str,
        *,
        size: int,
        seed: int,
        device: str | None = None,
        options: Sam2Options | None = None,
    ) -> "Sam2Segmenter":
        """A segmenter with random weights, for tests and timings."""
        return cls(random_network(variant, size=size, seed=seed), device=device, options=options)

    @torch.inference_mode()
    def encode(self, images: Sequence[FloatArray]) -> list[Features]:
        """Encode images as `ReferenceSegmenter.encode` says: stretched to S x S as SAM 2 does.

        The maps are the decoder's two skips, (32, S/4, S/4) and (64, S/8, S/8), and the features
        (256, S/16, S/16), float32 on the CPU. No embedding: SAM 2's features are poor descriptors.
        """

        def run(part: slice) -> list[Features]:
            batch = torch.stack([picture(image, size=self.size) for image in images[part]])
            with self._lock, self._precision():
                maps = self._module.forward_image(batch.to(self.device))["backbone_fpn"]
            maps = [level.float().cpu() for level in maps]
            return [
                Features(tuple(level[i].clone() for level in maps), None, self.fingerprint)
                for i in range(len(batch))
            ]

        parts, self._encode_batch = in_batches(
            run, len(images), batch=self._encode_batch, hint=OUT_OF_MEMORY_HINT
        )
        return [features for part in parts for features in part]

    @torch.inference_mode()
    def remember(self, features: Features, masks: Tensor) -> Memory:
        """Make the memory of one reference: masks (L, H, W) bool on the image's own grid."""
        if masks.ndim != 3 or masks.dtype != torch.bool:
            msg = f"Masks must be (L, H, W) bool, got {tuple(masks.shape)} {masks.dtype}."
            raise LabelError(msg)
        self._check_owner(features)

        def run(part: slice) -> Tensor:
            with self._lock, self._precision():
                return self._remember(features, square_masks(masks[part], size=self.size))

        parts, self._remember_batch = in_batches(
            run, len(masks), batch=self._remember_batch, hint=OUT_OF_MEMORY_HINT
        )
        width = self._feature_numbers + POINTER_PARTS * self._module.hidden_dim + 1
        empty = torch.empty(0, width, dtype=self.options.memory_dtype)
        return Memory(image=torch.empty(0), labels=torch.cat([empty, *parts]))

    def study_of(self, examples: Iterable[Example]) -> Study:  # noqa: ARG002
        """See `ReferenceSegmenter.study_of`: SAM 2 has nothing to choose."""
        return Study()

    def looks_of(
        self,
        examples: Iterable[Example],  # noqa: ARG002
        study: Study,
        make_way: Callable[[], None],  # noqa: ARG002
    ) -> Study:
        """See `ReferenceSegmenter.looks_of`: SAM 2 learns none."""
        return study

    @torch.inference_mode()
    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: Tensor,
        study: Study = AS_TRAINED,  # noqa: ARG002
        *,
        neighbors: Sequence[Memory | None] = (),
    ) -> Prediction:
        """Segment one query slice as `ReferenceSegmenter.segment` says.

        Args:
            query: of `encode`.
            references: R >= 1 memories, each with L rows in the same label order.
            known: (R, L) bool.
            study: of `study_of`.
            neighbors: memories of slices of the same volume, at distance 1, 2, .. 6 from the query
                (None: not there), with all L labels known. They take SAM 2's slots for recent
                frames; what is farther away is ignored.
        """
        self._check_owner(query)
        rows = torch.stack([memory.labels for memory in references])  # (R, L, numbers)
        if known.shape != rows.shape[:2] or not bool(known.any(dim=0).all()):
            msg = (
                f"`known` is {tuple(known.shape)} for {rows.shape[0]} references and "
                f"{rows.shape[1]} labels; each label must be known to at least one reference."
            )
            raise LabelError(msg)
        known = known.cpu()
        recent = {
            distance: memory.labels
            for distance, memory in enumerate(neighbors, start=1)
            if memory is not None and distance < self._module.num_maskmem
        }
        shown = ((rows[..., -1] > 0) & known).any(dim=0)
        for near in recent.values():
            shown |= near[:, -1] > 0

        count = rows.shape[1]
        scores = torch.full((count, self.size, self.size), ABSENT_SCORE)
        # No reference shows the label in n of n cases: Laplace's rule of succession
        presence = 1 / (known.sum(dim=0).float() + 2)
        quality = 1 - presence
        for pattern, group in group_labels(known, shown).items():
            chosen = torch.tensor(pattern)
            tokens = (int(chosen.sum()) + len(recent)) * self._grid**2

            def run(
                part: slice, chosen: Tensor = chosen, group: list[int] = group
            ) -> tuple[Tensor, Tensor, Tensor]:
                some = group[part]
                near = {distance: memory[some] for distance, memory in recent.items()}
                with self._lock, self._precision():
                    return self._segment(query, rows[chosen][:, some], near)

            batch = max(1, self._token_budget // tokens)
            parts, fitted = in_batches(run, len(group), batch=batch, hint=OUT_OF_MEMORY_HINT)
            if fitted < batch:
                self._token_budget = fitted * tokens
            scores[group] = torch.cat([part[0] for part in parts])
            presence[group] = torch.cat([part[1] for part in parts])
            quality[group] = torch.cat([part[2] for part in parts])
        return Prediction(scores=scores, presence=presence, quality=quality)

    def _precision(self) -> torch.autocast:
        """The precision of a forward pass, whatever the caller has switched on outside."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half)

    def _check_owner(self, features: Features) -> None:
        if features.owner != self.fingerprint:
            msg = f"Features of {features.owner} were given to {self.fingerprint}; encode again."
            raise ValueError(msg)

    def _remember(self, features: Features, masks: Tensor) -> Tensor:
        """Rows (L, numbers) of masks (L, 1, S, S) float 0/1, through SAM 2's own two steps."""
        module = self._module
        maps = [
            level.to(self.device)[None].expand(len(masks), -1, -1, -1) for level in features.maps
        ]
        low, high, _, _, _, pointers, object_scores = module._use_mask_as_output(
            maps[-1], maps[:-1], masks.to(self.device)
        )
        if self.options.blur_masks:
            high = F.interpolate(low, size=high.shape[-2:], mode="bilinear", align_corners=False)
        memories, _ = module._encode_new_memory(
            current_vision_feats=[maps[-1].flatten(2).permute(2, 0, 1)],
            feat_sizes=[(self._grid, self._grid)],
            pred_masks_high_res=high,
            object_score_logits=object_scores,
            is_mask_from_pts=True,
        )
        numbers = [memories.flatten(1).float(), *split_values(pointers.float()), object_scores > 0]
        return torch.cat([n.cpu().to(self.options.memory_dtype) for n in numbers], dim=1)

    def _segment(
        self, query: Features, rows: Tensor, recent: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, presence and quality of labels that share their references.

        Args:
            query: of `encode`.
            rows: (R, L, numbers) references.
            recent: distance in slices -> (L, numbers).
        """
        module = self._module
        count = rows.shape[1]
        skip4, skip8, features = (level.to(self.device)[None] for level in query.maps)
        position = module.image_encoder.neck.position_encoding(features)
        tokens, codes, pointer_tokens = memory_tokens(
            module,
            rows.to(self.device),
            {distance: memory.to(self.device) for distance, memory in recent.items()},
            pointer_distance=self.options.pointer_distance,
        )
        conditioned = module.memory_attention(
            curr=features.flatten(2).permute(2, 0, 1).expand(-1, count, -1),
            curr_pos=position.flatten(2).permute(2, 0, 1).expand(-1, count, -1),
            memory=tokens,
            memory_pos=codes,
            num_obj_ptr_tokens=pointer_tokens,
        )
        conditioned = conditioned.permute(1, 2, 0).reshape(count, -1, self._grid, self._grid)
        no_point = torch.zeros(count, 1, 2, device=self.device)
        no_label = -torch.ones(count, 1, dtype=torch.int32, device=self.device)
        sparse, dense = module.sam_prompt_encoder(
            points=(no_point, no_label), boxes=None, masks=None
        )
        masks, ious, _, object_scores = module.sam_mask_decoder(
            image_embeddings=conditioned,
            image_pe=module.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=module._use_multimask(False, None),
            repeat_image=False,
            high_res_features=[skip4.expand(count, -1, -1, -1), skip8.expand(count, -1, -1, -1)],
        )
        best = ious.argmax(dim=1)
        every = torch.arange(count, device=self.device)
        iou = ious[every, best].float().clamp(0, 1)
        presence = object_scores[:, 0].float().sigmoid()
        present = presence > self.options.absence_threshold
        logits = masks[every, best].float()[:, None]
        logits = torch.where(present[:, None, None, None], logits, ABSENT_SCORE)
        logits = F.interpolate(
            logits, size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        # a mask is worth its Dice, given that the label is there; an empty one, if it is not
        quality = torch.where(present, 2 * iou / (1 + iou), 1 - presence)
        return logits[:, 0].cpu(), presence.cpu(), quality.cpu()
