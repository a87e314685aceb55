"""Retrieval embeddings from published image encoders: DINOv2 and CLIP, through `transformers`.

- **DINOv2** (arXiv 2304.07193): the class token after the last layer norm, which is what DINOv2's
  own retrieval and nearest-neighbour evaluations use; `pooling="mean"` takes the mean of the patch
  tokens instead. Any size that is a multiple of the patch (14) works.
- **CLIP** (arXiv 2103.00020), the choice of MatchSeg: the projected image embedding, at the one
  size that it was trained for.

Pictures are stretched to a square, not cropped at the centre: what lies at a slice's border is
anatomy too, and the segmenters stretch as well. Files are local, always; see `weights.py`.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import RequestError, WeightsError
from lib.models.devices import choose_device, in_batches
from lib.models.weights import FETCH, state_digest
from lib.types import Features, FloatArray

Pooling = Literal["cls", "mean", "projection"]
BATCH = 16
DEFAULT_SIZE = 224
# mean and standard deviation of the pictures each encoder was trained on
STATISTICS = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
VERSION = 1  # raised when the same weights would give other vectors


class TransformersEmbedder:
    """Implements `lib.models.protocol.Embedder` with a DINOv2 or CLIP folder.

    Args:
        folder: with `config.json` and the weights, as `transformers` saves them.
        name: what to call it, for instance "dinov2-small".
        size: side of the square input in pixels; None: 224, or the size CLIP was trained for.
        pooling: "cls" or "mean" for DINOv2, "projection" for CLIP; None: the first that applies.
        device: as for `choose_device`.

    Raises:
        WeightsError: the folder holds no DINOv2 or CLIP, or not all of it.
        RequestError: impossible size or pooling.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        size: int | None = None,
        pooling: Pooling | None = None,
        device: str | None = None,
    ) -> None:
        self.name = name
        self.device = choose_device(device)
        kind = _kind(folder)
        self._pooling: Pooling = _checked_pooling(kind, pooling)
        self._module = _load(folder, kind, name=name).to(self.device)
        self._size = _checked_size(kind, self._module.config, size)
        self._statistics = STATISTICS[kind]
        self._batch = BATCH
        self._lock = threading.Lock()
        digest = state_digest(self._module.state_dict())
        recipe = (digest, self._pooling, self._size, "stretched", VERSION)
        self.fingerprint = f"{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"

    @torch.inference_mode()
    def embed(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """Embed images, grey (H, W) or RGB (H, W, 3) in 0..1 -> (N, E) float32, unit length.

        Args:
            images: of any sizes.
            features: of a segmenter; of no use to this embedder.
        """
        del features

        def run(part: slice) -> Tensor:
            batch = torch.stack([self._picture(image) for image in images[part]])
            with self._lock, torch.autocast(self.device.type, enabled=False):
                return F.normalize(self._vectors(batch.to(self.device)), dim=1).cpu()

        if not images:
            return np.zeros((0, self._width), np.float32)
        hint = "Use a smaller embedder or device=cpu."
        parts, self._batch = in_batches(run, len(images), batch=self._batch, hint=hint)
        vectors: FloatArray = torch.cat(parts).numpy()
        return vectors

    def regions(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """See `Embedder.regions`: whole pictures, (N, 1, E)."""
        return self.embed(images, features)[:, None]

    @property
    def _width(self) -> int:
        """E, the length of an embedding."""
        config = self._module.config
        return int(config.projection_dim if self._pooling == "projection" else config.hidden_size)

    def _vectors(self, batch: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> vectors (B, E) of any length."""
        output = self._module(pixel_values=batch)
        if self._pooling == "projection":
            vectors: Tensor = output.image_embeds
        elif self._pooling == "cls":
            vectors = output.last_hidden_state[:, 0]
        else:
            vectors = output.last_hidden_state[:, 1:].mean(dim=1)
        return vectors.float()

    def _picture(self, image: FloatArray) -> Tensor:
        """One image -> (3, S, S), stretched and normalised."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        pixels = pixels[None].expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        pixels = F.interpolate(
            pixels[None], size=(self._size, self._size), mode="bicubic", antialias=True
        )[0]
        mean, std = (torch.tensor(values)[:, None, None] for values in self._statistics)
        return (pixels.clamp(0, 1) - mean) / std


def _kind(folder: Path) -> str:
    """Which encoder a folder holds: "dinov2" or "clip"."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = {"dinov2": "dinov2", "clip": "clip", "clip_vision_model": "clip"}.get(
            config.get("model_type")
        )
    except (OSError, ValueError, AttributeError) as error:
        msg = f"{folder}/config.json cannot be read ({error}). Fetch it with `{FETCH} NAME`."
        raise WeightsError(msg) from error
    if kind is None:
        msg = (
            f"{folder} holds a model of type {config.get('model_type')!r}; only dinov2 and clip "
            "can be used for retrieval."
        )
        raise WeightsError(msg)
    return kind


def _load(folder: Path, kind: str, *, name: str) -> Any:
    """The network in evaluation mode, with all of its weights from the folder."""
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    network = Dinov2Model if kind == "dinov2" else CLIPVisionModelWithProjection
    reporter = logging.getLogger("transformers.modeling_utils")
    level = reporter.level
    reporter.setLevel(logging.ERROR)  # a page of warnings that CLIP's text half is not used
    try:
        module, report = network.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:
        msg = (
            f"{folder} cannot be loaded ({type(error).__name__}: {error}). Fetch it again with "
            f"`{FETCH} {name}`."
        )
        raise WeightsError(msg) from error
    finally:
        reporter.setLevel(level)
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        msg = (
            f"{folder} lacks {len(missing)} tensors, for instance {missing[0]}. Fetch it again "
            f"with `{FETCH} {name}`."
        )
        raise WeightsError(msg)
    return module.eval().requires_grad_(False)


def _checked_pooling(kind: str, pooling: Pooling | None) -> Pooling:
    allowed: dict[str, tuple[Pooling, ...]] = {"dinov2": ("cls", "mean"), "clip": ("projection",)}
    chosen = pooling or allowed[kind][0]
    if chosen not in allowed[kind]:
        msg = f"Pooling {chosen!r} does not go with {kind}; use {' or '.join(allowed[kind])}."
        raise RequestError(msg)
    return chosen


def _checked_size(kind: str, config: Any, size: int | None) -> int:
    """The input's side; the encoders themselves would crop or fail."""
    trained, patch = int(config.image_size), int(config.patch_size)
    if kind == "clip":
        if size not in (None, trained):
            msg = f"CLIP's size is {size}; this one works at {trained} pixels only."
            raise RequestError(msg)
        return trained
    chosen = size or DEFAULT_SIZE
    if chosen % patch or chosen <= 0:
        msg = (
            f"DINOv2's size is {chosen}; it must be a multiple of its patch, {patch} pixels, "
            f"for instance {max(1, round(chosen / patch)) * patch}."
        )
        raise RequestError(msg)
    return chosen
