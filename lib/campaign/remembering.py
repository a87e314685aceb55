"""Networks that remember: every picture is encoded once, every question answered once.

A campaign asks the same things again and again: the same query slices at each budget, and often
the same references. The two classes here stand in front of a segmenter and an embedder, speak their
protocols, and change nothing in the answers but this: scores are kept at half precision, so
that the first answer is rounded as the remembered ones are.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from time import perf_counter
from weakref import WeakKeyDictionary

import numpy as np
import torch

from lib.models.protocol import AS_TRAINED, Embedder, ReferenceSegmenter
from lib.types import Example, Features, FloatArray, Memory, Prediction, Study

_GIB = 1 << 30


class RememberingSegmenter:
    """A `ReferenceSegmenter` before another one.

    Args:
        segmenter: does the work.
        folder: features are kept here, one file a picture.
        features_bytes: at most so much on disk; pictures beyond are encoded when they are asked
            for.
        answers_bytes: of predictions in memory, the least recently used go first.
    """

    def __init__(
        self,
        segmenter: ReferenceSegmenter,
        folder: Path,
        *,
        features_bytes: int = 8 * _GIB,
        answers_bytes: int = _GIB,
    ) -> None:
        self.name = segmenter.name
        self.fingerprint = segmenter.fingerprint
        self.size = segmenter.size
        self.encoded = 0
        self.asked = 0
        self.answered = 0
        self.seconds = 0.0
        self._segmenter = segmenter
        self._folder = folder
        self._features_left = features_bytes
        self._answers_left = answers_bytes
        self._answers: OrderedDict[bytes, Prediction] = OrderedDict()
        self._pictures: WeakKeyDictionary[Features, bytes] = WeakKeyDictionary()
        self._lock = threading.RLock()
        self._device: torch.device | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._features_left -= sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def encode(self, images: Sequence[FloatArray]) -> list[Features]:
        """See `ReferenceSegmenter.encode`; only pictures never seen are encoded."""
        marks = [digest_of(image) for image in images]
        found = [self._read(mark) for mark in marks]
        missing = [row for row, features in enumerate(found) if features is None]
        if missing:
            for row, features in zip(
                missing, self._segmenter.encode([images[row] for row in missing]), strict=True
            ):
                self._write(marks[row], features)
                found[row] = features
            self.encoded += len(missing)
        kept = [features for features in found if features is not None]
        for mark, features in zip(marks, kept, strict=True):
            self._pictures[features] = mark
        return kept

    def remember(self, features: Features, masks: torch.Tensor) -> Memory:
        """See `ReferenceSegmenter.remember`; the bank keeps memories already."""
        return self._segmenter.remember(features, masks)

    def study_of(self, examples: Iterable[Example]) -> Study:
        """See `ReferenceSegmenter.study_of`."""
        return self._segmenter.study_of(examples)

    def looks_of(
        self, examples: Iterable[Example], study: Study, make_way: Callable[[], None]
    ) -> Study:
        """See `ReferenceSegmenter.looks_of`."""
        return self._segmenter.looks_of(examples, study, make_way)

    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: torch.Tensor,
        study: Study = AS_TRAINED,
    ) -> Prediction:
        """See `ReferenceSegmenter.segment`; the same references in any order are one question."""
        picture = self._pictures.get(query)
        if picture is None:
            return self._segmenter.segment(query, references, known, study)
        marks = sorted(_mark(m, row) for m, row in zip(references, known.tolist(), strict=True))
        told = repr((study.place, study.aligned, study.reach)).encode()
        asked = picture + b"".join(marks) + told + _looks(study)
        question = blake2b(asked, digest_size=16).digest()
        self.asked += 1
        with self._lock:
            if question in self._answers:
                self._answers.move_to_end(question)
                return _widened(self._answers[question])
        start = perf_counter()
        answer = self._segmenter.segment(query, references, known, study)
        self.seconds += perf_counter() - start
        self.answered += 1
        kept = Prediction(answer.scores.half(), answer.presence.half(), answer.quality.half())
        with self._lock:
            self._answers[question] = kept
            self._answers_left -= kept.scores.nbytes
            while self._answers_left < 0 and len(self._answers) > 1:
                self._answers_left += self._answers.popitem(last=False)[1].scores.nbytes
        return _widened(kept)

    def _read(self, mark: bytes) -> Features | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(mark)
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)  # cut short by a full disk: made again
            return None
        embedding = tensors.pop("embedding", None)
        maps = tuple(tensors[str(row)].to(self._home()) for row in range(len(tensors)))
        vector = None if embedding is None else embedding.numpy()
        return Features(maps, vector, self.fingerprint)

    def _home(self) -> torch.device:
        """Where the segmenter wants features to be: a file does not say."""
        if self._device is None:
            blank = np.zeros((self.size, self.size), np.float32)
            self._device = self._segmenter.encode([blank])[0].maps[0].device
        return self._device

    def _write(self, mark: bytes, features: Features) -> None:
        from safetensors.torch import save_file

        size = sum(one.nbytes for one in features.maps)
        if size > self._features_left:
            return
        tensors = {str(row): one.cpu().contiguous() for row, one in enumerate(features.maps)}
        if features.embedding is not None:
            tensors["embedding"] = torch.from_numpy(np.array(features.embedding))
        path = self._path(mark)
        beside = path.with_suffix(".part")
        save_file(tensors, beside)
        beside.replace(path)
        self._features_left -= size

    def _path(self, mark: bytes) -> Path:
        return self._folder / f"{mark.hex()}.safetensors"


class RememberingEmbedder:
    """An `Embedder` before another one; vectors are small and stay in memory."""

    def __init__(self, embedder: Embedder) -> None:
        self.name = embedder.name
        self.fingerprint = embedder.fingerprint
        self._embedder = embedder
        self._vectors: dict[bytes, FloatArray] = {}

    def embed(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """See `Embedder.embed`; only pictures never seen are embedded."""
        marks = [digest_of(image) for image in images]
        missing = [row for row, mark in enumerate(marks) if mark not in self._vectors]
        if missing:
            some = None if features is None else [features[row] for row in missing]
            vectors = self._embedder.embed([images[row] for row in missing], some)
            self._vectors.update((marks[row], v) for row, v in zip(missing, vectors, strict=True))
        if not marks:
            return self._embedder.embed(images, features)
        return np.stack([self._vectors[mark] for mark in marks])

    def regions(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """See `Embedder.regions`; asked for once an image, whose rows the pool keeps."""
        return self._embedder.regions(images, features)


def digest_of(image: FloatArray) -> bytes:
    """What tells one picture from another: its shape and its pixels."""
    mark = blake2b(repr((image.shape, image.dtype.str)).encode(), digest_size=16)
    mark.update(np.ascontiguousarray(image).data)
    return mark.digest()


def _mark(memory: Memory, known: Sequence[bool]) -> bytes:
    mark = blake2b(bytes(known), digest_size=16)
    for tensor in (memory.image, memory.labels):
        mark.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        mark.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return mark.digest()


def _looks(study: Study) -> bytes:
    if study.looks is None:
        return b""
    parts = study.looks.correction
    mark = blake2b(digest_size=16)
    for tensor in (parts.weights, parts.gain, parts.offset):
        mark.update(tensor.contiguous().numpy().tobytes())
    return mark.digest()


def _widened(kept: Prediction) -> Prediction:
    return Prediction(kept.scores.float(), kept.presence.float(), kept.quality.float())
