"""Which segmenter and embedder to use, and why; what is heavy is imported when it is needed."""

import logging
from dataclasses import dataclass
from pathlib import Path

from lib.errors import RequestError
from lib.models.devices import choose_device
from lib.models.protocol import Embedder, ReferenceSegmenter
from lib.models.weights import find, require

logger = logging.getLogger(__name__)

SEGMENTERS = ("auto", "sam2", "matchseg")
EMBEDDERS = ("auto", "bundled", "dinov2-small", "dinov2-base", "dinov2-large", "clip")
VARIANTS = {
    "tiny": "tiny",
    "small": "small",
    "base": "base-plus",
    "base-plus": "base-plus",
    "large": "large",
}
VERSIONS = ("2.1", "2")


@dataclass(frozen=True)
class Plan:
    """What will be used, known without loading anything.

    Attributes:
        name: "sam2" or "matchseg"; of an embedder, "bundled" or the name of its weights.
        reason: one sentence for people, why.
        weights: name of the published weights, None for the bundled network.
        path: where these weights are, None if they are not here (building will say so).
    """

    name: str
    reason: str
    weights: str | None = None
    path: Path | None = None


def plan_segmenter(
    choice: str = "auto",
    *,
    weights: Path | None = None,
    device: str | None = None,
    sam2_variant: str = "tiny",
    sam2_version: str = "2.1",
) -> Plan:
    """Choose the segmenter: as told, or SAM 2 where its weights and a GPU are present.

    Args:
        choice: one of `SEGMENTERS`.
        weights: folder of fetched weights.
        device: as for `choose_device`.
        sam2_variant: one of `VARIANTS`.
        sam2_version: one of `VERSIONS`.

    Raises:
        RequestError: an option is unknown, or the device is not there.
    """
    _check("segmenter", choice, SEGMENTERS)
    _check("sam2_variant", sam2_variant, tuple(VARIANTS))
    _check("sam2_version", sam2_version, VERSIONS)
    name = f"sam{'2.1' if sam2_version == '2.1' else '2'}-{VARIANTS[sam2_variant]}"
    where = choose_device(device)
    if choice == "matchseg":
        return Plan("matchseg", "the bundled network, as chosen by the option segmenter")
    path = find(name, weights)
    if choice == "sam2":
        return Plan("sam2", f"{name}, as chosen by the option segmenter", name, path)
    if path is not None and where.type != "cpu":
        return Plan("sam2", f"{name}: its weights and a GPU ({where}) are present", name, path)
    lacking = [] if path else [f"the weights {name} are not on this machine"]
    lacking += [] if where.type != "cpu" else ["the device is the CPU"]
    return Plan("matchseg", f"the bundled network: {' and '.join(lacking)}")


def build_segmenter(
    choice: str = "auto",
    *,
    weights: Path | None = None,
    device: str | None = None,
    sam2_variant: str = "tiny",
    sam2_version: str = "2.1",
    sam2_size: int = 1024,
    learns_looks: bool = True,
) -> ReferenceSegmenter:
    """Load the segmenter that `plan_segmenter` names.

    Args:
        choice, weights, device, sam2_variant, sam2_version: as of `plan_segmenter`.
        sam2_size: working size of SAM 2.
        learns_looks: of the bundled network, see `MatchSegSegmenter`.

    Raises:
        WeightsError: its weights are not here or damaged; the message carries the command.
        RequestError: an option is unknown, or the device is not there.
    """
    plan = plan_segmenter(
        choice,
        weights=weights,
        device=device,
        sam2_variant=sam2_variant,
        sam2_version=sam2_version,
    )
    logger.info("segmenter: %s", plan.reason)
    where = str(choose_device(device))
    if plan.weights is None:
        from lib.models.matchseg import MatchSegSegmenter

        return MatchSegSegmenter.load_bundled(device=where, learns_looks=learns_looks)
    from lib.models.sam2 import Sam2Segmenter

    checkpoint = plan.path or require(plan.weights, weights)
    return Sam2Segmenter.load(plan.weights, checkpoint, size=sam2_size, device=where)


def plan_embedder(choice: str = "auto", *, weights: Path | None = None) -> Plan:
    """Choose the embedder: as told, or the bundled network's own encoder.

    `auto` never depends on what happens to be on the disk: other embeddings mean that the whole
    bank is built anew.

    Raises:
        RequestError: the option is unknown.
    """
    _check("embedder", choice, EMBEDDERS)
    if choice == "auto":
        return Plan("bundled", "features of the bundled network's encoder: no download needed")
    reason = f"{choice}, as chosen by the option embedder"
    if choice == "bundled":
        return Plan("bundled", reason)
    return Plan(choice, reason, choice, find(choice, weights))


def build_embedder(
    choice: str,
    segmenter: ReferenceSegmenter,
    *,
    weights: Path | None = None,
    device: str | None = None,
) -> Embedder:
    """Load the embedder that `plan_embedder` names.

    Args:
        choice: one of `EMBEDDERS`.
        segmenter: whose encoder is shared if it is the bundled network.
        weights: folder of fetched weights.
        device: as for `choose_device`.

    Raises:
        WeightsError: its weights are not here or damaged; the message carries the command.
        RequestError: an option is unknown, or the device is not there.
    """
    plan = plan_embedder(choice, weights=weights)
    logger.info("embedder: %s", plan.reason)
    where = str(choose_device(device))
    if plan.weights is None:
        from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter

        if not isinstance(segmenter, MatchSegSegmenter):
            segmenter = MatchSegSegmenter.load_bundled(device=where)
        return BundledEmbedder(segmenter)
    from lib.models.encoders import TransformersEmbedder

    folder = plan.path or require(plan.weights, weights)
    return TransformersEmbedder(folder, name=plan.weights, device=where)


def _check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        msg = f"{option} is {value!r}; allowed are {', '.join(allowed)}."
        raise RequestError(msg)
