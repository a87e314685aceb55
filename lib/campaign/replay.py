"""The app replayed: its runtime, bank and engine, over references that are made once.

Two banks, both the app's own class. The library holds all labelled images; it is encoded once. The
campaign's bank follows the labels given so far through the app's own `sync`, and takes each
reference from the library instead of encoding it again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lib.annotation import read_annotation
from lib.campaign.remembering import RememberingEmbedder, RememberingSegmenter
from lib.campaign.scoring import Truth
from lib.imaging.geometry import Geometry
from lib.imaging.intensity import grey_range
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.slices import through_plane_axis
from lib.memory.bank import MemoryBank
from lib.retrieval.ranking import PoolView
from lib.runtime import Runtime
from lib.segmentation import Segmentation
from lib.segmenter import ReferenceEngine
from lib.settings import RefSegSettings
from lib.types import IntArray, LabelledImage, Reference

_CASES_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Case:
    """An image to be segmented, its scored slices only, and what was drawn there.

    Attributes:
        image: may hold fewer slices than the file.
        truth: on the same slices.
        axis: cut along.
        slices: numbers of the slices in the file.
    """

    image: ImageVolume
    truth: Truth
    axis: int
    slices: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of both arrays."""
        return self.image.voxels.nbytes + self.truth.label_map.nbytes


class CampaignRuntime(Runtime):
    """The app's runtime over networks that remember and a bank that is filled from a library.

    Args:
        settings: as the server's; its own bank folder is not touched.
        work: folder of all that is kept between runs.
        studies: folder of the datastore.
    """

    def __init__(self, settings: RefSegSettings, *, work: Path, studies: str) -> None:
        own = settings.model_copy(update={"bank": None})
        super().__init__(own, bank_root=work / "campaign", studies=studies)
        self._work_folder = work
        self._remembering: ReferenceEngine | None = None
        self._library: MemoryBank | None = None
        self.segmenter: RememberingSegmenter

    @property
    def engine(self) -> ReferenceEngine:
        """The app's engine; its networks remember."""
        with self._build_lock:
            if self._remembering is None:
                plain, chosen = super().engine, self.settings
                folder = self._work_folder / "features" / plain.segmenter.fingerprint
                self.segmenter = RememberingSegmenter(plain.segmenter, folder)
                self._remembering = ReferenceEngine(
                    self.segmenter,
                    RememberingEmbedder(plain.embedder),
                    annotation=chosen.annotation,
                    window=chosen.window,
                    axis=chosen.axis_index,
                    batch=chosen.batch,
                )
            return self._remembering

    @property
    def library(self) -> MemoryBank:
        """References of all labelled images."""
        with self._build_lock:
            if self._library is None:
                encode = super()._references_of
                self._library = MemoryBank(self._work_folder / "library", self.fingerprint, encode)
            return self._library

    def _references_of(self, labelled: LabelledImage) -> Iterator[Reference]:
        for key in self.library.own_slices(labelled.image_id):
            yield from self.library.references([key])


class Replay:
    """A fully labelled folder on which campaigns are played.

    Args:
        runtime: of the folder.
        labelled: all its labelled images.
        slices: at most so many slices of a target are segmented; 0: all.
    """

    def __init__(
        self, runtime: CampaignRuntime, labelled: Sequence[LabelledImage], *, slices: int = 0
    ) -> None:
        self.runtime = runtime
        self.labelled = {one.image_id: one for one in labelled}
        self.names: tuple[str, ...] = ()
        self.failed: tuple[tuple[str, str], ...] = ()
        self._slices = slices
        self._cases: OrderedDict[str, Case] = OrderedDict()

    def prepare(self, on_image: Callable[[], None]) -> PoolView:
        """Encode what was not encoded yet; images whose label cannot be learned are left out.

        Args:
            on_image: called once for each image.

        Returns:
            the pool that strategies choose from.
        """
        library, failed = self.runtime.library, list[tuple[str, str]]()
        embedded: set[str] = set()
        for image_id, one in self.labelled.items():
            failed += library.sync([one], complete=False).failed
            embedded |= self.runtime.pool.advance({image_id: one.image_path}, seconds=0)
            on_image()
        library.sync(list(self.labelled.values()))
        self.failed = tuple(failed)
        lost = {image_id for image_id, _ in failed} | (self.labelled.keys() - embedded)
        for image_id in lost:
            del self.labelled[image_id]
        self.names = self.runtime.settings.labels or tuple(sorted(library.labels()))
        return self.runtime.pool.view(list(self.labelled))

    def foreground(self) -> Mapping[str, float]:
        """Share of each image that is labelled at all: what only a simulator can know."""
        shares = {}
        for image_id, one in self.labelled.items():
            image = read_image(one.image_path)
            annotation = read_annotation(one, image, axis=self.runtime.settings.axis_index)
            shares[image_id] = float((annotation.label_map != 0).mean())
        return shares

    def learn(self, picked: Sequence[str]) -> None:
        """Let the bank hold the labels of exactly these images, as after their submission."""
        self.runtime.sync(lambda: [self.labelled[image_id] for image_id in picked])

    def segment(self, image_id: str) -> tuple[IntArray, Segmentation]:
        """Segment one image by what was learned.

        Returns:
            (I, J, K) numbered as `names` from 1, and the engine's answer as it is.
        """
        answer = self.runtime.engine.segment(
            self.case(image_id).image,
            self.runtime.bank,
            labels=self.names,
            options=self.runtime.options,
        )
        numbers = [0, *(self.names.index(name) + 1 for name in answer.labels)]
        return np.array(numbers, np.int32)[answer.label_map], answer

    def seconds_a_slice(self, image_id: str) -> float:
        """How long the network takes for a slice with as many references as there will be."""
        case, segmenter = self.case(image_id), self.runtime.segmenter
        one = thinned(case.image, inner_slices(len(case.slices), 1), case.axis)
        spent, answered = segmenter.seconds, segmenter.answered
        self.runtime.engine.segment(
            one, self.runtime.library, labels=self.names, options=self.runtime.options
        )
        return (segmenter.seconds - spent) / max(1, segmenter.answered - answered)

    def case(self, image_id: str) -> Case:
        """An image with its truth; the last ones read are kept."""
        if image_id in self._cases:
            self._cases.move_to_end(image_id)
            return self._cases[image_id]
        case = self._read(self.labelled[image_id])
        self._cases[image_id] = case
        while (
            sum(one.bytes for one in self._cases.values()) > _CASES_BYTES and len(self._cases) > 1
        ):
            self._cases.popitem(last=False)
        return case

    def _read(self, labelled: LabelledImage) -> Case:
        chosen = self.runtime.settings
        image = read_image(labelled.image_path)
        axis = through_plane_axis(image, chosen.axis_index)
        annotation = read_annotation(labelled, image, rule=chosen.annotation, axis=axis)
        numbers = np.zeros_like(annotation.label_map)
        for value, name in enumerate(self.names, start=1):
            if name in annotation.values:
                numbers[annotation.label_map == annotation.values[name]] = value
        count = image.geometry.shape[axis]
        kept = inner_slices(count, self._slices)
        spacing = image.geometry.spacing_mm if image.kind == "volume" else None
        if len(kept) < count:
            image, numbers, spacing = thinned(image, kept, axis), numbers.take(kept, axis), None
        return Case(image, Truth(numbers, self.names, spacing), axis, tuple(kept))


def inner_slices(count: int, limit: int) -> list[int]:
    """All slices, or `limit` evenly spread ones that are not the ends."""
    if limit <= 0 or limit >= count:
        return list(range(count))
    return [int((row + 0.5) * count / limit) for row in range(limit)]


def thinned(image: ImageVolume, kept: Sequence[int], axis: int) -> ImageVolume:
    """The same volume with some of its slices, as grey as they were in the whole."""
    voxels = image.voxels.take(list(kept), axis)
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])
    return replace(
        image,
        voxels=voxels,
        geometry=Geometry(shape, image.geometry.affine_ras),
        adjacent=False,
        value_range=image.value_range or grey_range(image.voxels),
    )
