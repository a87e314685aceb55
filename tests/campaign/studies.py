"""Folders of small labelled pictures, and networks that need no training to be right."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.campaign.replay import CampaignRuntime
from lib.models.protocol import AS_TRAINED
from lib.segmenter import ReferenceEngine
from lib.settings import RefSegSettings
from lib.types import Example, Features, FloatArray, LabelledImage, Memory, Prediction, Study

SIZE = 24
NAMES = {1: "ball", 2: "box"}


def make_studies(folder: Path, count: int, *, size: int = SIZE) -> Path:
    """Pictures with a bright ball, and every second one with a box, under labels/final."""
    labels = folder / "labels" / "final"
    labels.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for number in range(count):
        at, radius = rng.uniform(0.3 * size, 0.7 * size, 2), rng.uniform(0.1, 0.25) * size
        drawn = ((rows - at[0]) ** 2 + (columns - at[1]) ** 2 < radius**2).astype(np.uint8)
        if number % 2:
            drawn[1 : size // 6, 1 : size // 4] = 2
        grey = 60 + 90 * (drawn == 1) + 60 * (drawn == 2) + rng.normal(0, 6, drawn.shape)
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(folder / f"p{number:02d}.png")
        Image.fromarray(drawn).save(labels / f"p{number:02d}.png")
    return folder


def labelled_in(folder: Path) -> list[LabelledImage]:
    return [
        LabelledImage(path.stem, path, folder / "labels" / "final" / path.name, NAMES)
        for path in sorted(folder.glob("*.png"))
    ]


class Averager:
    """A segmenter whose answer is plain: the mean of the known masks, less one half."""

    name = "averager"
    fingerprint = "averager-1"
    size = SIZE

    def __init__(self) -> None:
        self.encoded: list[bytes] = []
        self.asked = 0
        self.wait = 0.0  # seconds for each answer

    def encode(self, images: Sequence[FloatArray]) -> list[Features]:
        self.encoded += [image.tobytes() for image in images]
        return [Features((torch.from_numpy(image),), None, self.fingerprint) for image in images]

    def remember(self, features: Features, masks: torch.Tensor) -> Memory:
        return Memory(features.maps[0].clone(), masks.half())

    def study_of(self, examples: Iterable[Example]) -> Study:
        return Study()

    def looks_of(
        self, examples: Iterable[Example], study: Study, make_way: Callable[[], None]
    ) -> Study:
        return study

    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: torch.Tensor,
        study: Study = AS_TRAINED,
    ) -> Prediction:
        self.asked += 1
        time.sleep(self.wait)
        masks = torch.stack([memory.labels for memory in references]).float()  # (R, L, S, S)
        weights = known.float()[:, :, None, None]
        scores = (masks * weights).sum(0) / weights.sum(0) - 0.3
        return Prediction(scores, torch.ones(len(scores)), torch.full((len(scores),), 0.75))


class Thumbnail:
    """Pictures with the same pixels are nearest."""

    name = "thumbnail"
    fingerprint = "thumbnail-1"

    def embed(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        vectors = np.stack([image.reshape(-1) - image.mean() + 1e-3 for image in images])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def regions(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        return self.embed(images, features)[:, None]


def runtime_of(folder: Path, work: Path, *, k: int = 3) -> tuple[CampaignRuntime, Averager]:
    """The app's runtime over the averager instead of a trained network."""
    averager = Averager()
    runtime = CampaignRuntime(
        RefSegSettings(k=k, annotation="complete"), work=work, studies=str(folder)
    )
    runtime._engine = ReferenceEngine(averager, Thumbnail(), annotation="complete")
    return runtime, averager
