"""The bundled segmenter: `MatchSegNet` behind the protocol, its weights file, and its embedder."""

import hashlib
import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.durable import publish, stage
from lib.errors import RefSegError, WeightsError
from lib.models.alignment import displacements
from lib.models.devices import in_batches, is_out_of_memory
from lib.models.looks import LeftOut, corrected, learn_looks
from lib.models.network import FINE2, FINE4, Encoded, MatchSegNet, NetworkConfig, Remembered
from lib.models.protocol import AS_TRAINED
from lib.types import Example, Features, FloatArray, Memory, Prediction, Study

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent / "bundled" / "matchseg.safetensors"
THUMBNAIL = 16  # side of the small grey picture in the embedding
THUMBNAIL_WEIGHT = 0.7
REGIONS = 4  # to a side, of a picture in the pool; 8 choose little better, at four times the size
ENCODE_BATCH = 8
SUM_SCALE = 256.0  # keeps the sums over small masks clear of half precision's smallest numbers
OUT_OF_MEMORY_HINT = "Use fewer references (k), ask for fewer labels at once, or device=cpu."
# Weights of place that a study may choose, and with references aligned.
STILL, ALIGNED = (1 / 16, 1 / 4, 1.0, 4.0, 16.0), (4.0, 16.0)
PLACEMENTS = tuple((p, False) for p in STILL) + tuple((p, True) for p in ALIGNED)
FEWEST, FEW = 3, 4  # labelled slices; fewer say nothing of a study, or little
MOST_PLACED = 16  # labelled images, a slice of each, by which the use of place is chosen
COARSE = 8  # fine maps are kept with a memory as coarse as the vote's grid
ANSWERS_KEPT = 128  # (2 KB a label) of slices left out, which most labels submitted do not change
NEAREST = 8  # references by which it is told how far a picture is from all
REACH = 2.0  # farther than so many times the farthest slice left out, a study says nothing
_EMBEDDED = MatchSegNet.DESCRIPTOR + THUMBNAIL**2  # values of the embedding
VERSION = 3  # raised when a stored memory would no longer fit although the weights are the same


def standardize(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) -> zero mean, standard deviation 1/2, clipped to -2..2, per image."""
    mean = images.mean((1, 2, 3), keepdim=True)
    std = images.std((1, 2, 3), keepdim=True)
    return ((images - mean) / (2 * std + 1e-4)).clamp(-2, 2)


def save_weights(net: MatchSegNet, path: Path) -> str:
    """Write half-precision weights with the configuration in the header; returns the SHA-256.

    The file appears whole or not at all.
    """
    from safetensors.torch import save

    tensors = {k: v.detach().half().cpu().contiguous() for k, v in net.state_dict().items()}
    data = save(tensors, metadata={"config": json.dumps(asdict(net.config))})
    publish(stage(path, lambda file: file.write(data)), path)
    return hashlib.sha256(data).hexdigest()


def load_weights(path: Path, *, sha256: str | None = None) -> MatchSegNet:
    """Read what `save_weights` wrote, in float32 and evaluation mode.

    Raises:
        WeightsError: the file is absent, damaged, or not the one that `sha256` names.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        msg = (
            f"No network weights at {path.name}; the bundled file is part of the repository: "
            "restore it with git."
        )
        raise WeightsError(msg)
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            msg = (
                f"{path.name} is damaged: its SHA-256 is {found[:16]}..., "
                f"{sha256[:16]}... was expected. "
                "Restore it from the repository (git checkout lib/models/bundled)."
            )
            raise WeightsError(msg)
    try:
        with safe_open(path, "pt") as file:
            net = MatchSegNet(NetworkConfig(**json.loads(file.metadata()["config"])))
            net.load_state_dict({k: file.get_tensor(k).float() for k in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        msg = f"{path.name} is not a file of network weights that fits this version: {error}"
        raise WeightsError(msg) from error
    return net.eval()


@dataclass(frozen=True, eq=False)
class _Left:
    """A slice left out: losses (N,) of its vote by `PLACEMENTS`, distance to the voters."""

    losses: Tensor
    distance: float


class MatchSegSegmenter:
    """`ReferenceSegmenter` of the bundled network (or of any weights of its kind).

    Images are stretched to the square working grid; masks are averaged onto it, so that a
    structure smaller than a working pixel still leaves its share. Holds no state between calls but
    the number of images that the device has room for, and answers of slices left out.
    """

    name = "matchseg"

    def __init__(
        self,
        net: MatchSegNet,
        *,
        digest: str,
        device: str | None = None,
        learns_looks: bool = False,
    ):
        """Wrap a network.

        Args:
            net: the network.
            digest: identifies its weights (their SHA-256).
            device: to compute on.
            learns_looks: whether a study's looks are learned; not of a network that was trained on
                the study's own labels: what it says of these, even if they are left out as
                references, it knows from training.
        """
        self.size = net.config.size
        self._learns_looks = learns_looks
        self._answers: OrderedDict[bytes, Tensor] = OrderedDict()
        self._answers_lock = threading.Lock()
        self.digest = digest
        self.fingerprint = f"matchseg-v{VERSION}-{digest[:16]}-{self.size}"
        if not learns_looks:  # its memories hold less
            self.fingerprint += "-plain"
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._net = net.to(self._device).eval()
        self._encode_batch = ENCODE_BATCH

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        sha256: str | None = None,
        device: str | None = None,
        learns_looks: bool = False,
    ) -> "MatchSegSegmenter":
        """Load weights that `save_weights` wrote.

        Raises:
            WeightsError: see `load_weights`.
        """
        net = load_weights(path, sha256=sha256)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(net, digest=digest, device=device, learns_looks=learns_looks)

    @classmethod
    def load_bundled(
        cls, *, device: str | None = None, learns_looks: bool = True
    ) -> "MatchSegSegmenter":
        """Load the weights that are part of the repository, checked against their SHA-256."""
        expected = BUNDLED.with_suffix(".sha256")
        if not expected.is_file():
            msg = f"{expected.name} is missing; restore it with git checkout lib/models/bundled."
            raise WeightsError(msg)
        sha256 = expected.read_text(encoding="utf-8").split()[0]
        return cls.load(BUNDLED, sha256=sha256, device=device, learns_looks=learns_looks)

    @torch.inference_mode()
    def encode(self, images: Sequence[FloatArray]) -> list[Features]:
        """See `ReferenceSegmenter.encode`. Maps: descriptor, tokens, fine maps of strides 4, 2."""

        def run(part: slice) -> list[Features]:
            batch = torch.stack([self._fit(image) for image in images[part]])
            ready = standardize(batch).to(self._device, memory_format=torch.channels_last)
            encoded = self._net.encode(ready)
            vectors = pooled(encoded.descriptor, ready).float().cpu().numpy()
            maps = (encoded.descriptor, encoded.tokens, encoded.fine4, encoded.fine2)
            return [
                Features(tuple(m[i] for m in maps), vectors[i], self.fingerprint)
                for i in range(len(batch))
            ]

        parts, self._encode_batch = in_batches(
            run, len(images), batch=self._encode_batch, hint=OUT_OF_MEMORY_HINT
        )
        return [features for part in parts for features in part]

    @torch.inference_mode()
    def remember(self, features: Features, masks: Tensor) -> Memory:
        """See `ReferenceSegmenter.remember`. Half precision; one flat row per label.

        Where looks are learned it keeps, beside what references are asked for, what a query is: so
        a slice can be left out, and segmented by the others, without its image.
        """
        side = (self.size, self.size)
        shares = F.interpolate(
            masks.to(self._device).float()[None], size=side, mode="bilinear", antialias=True
        )
        with _room_for(len(masks), 1):
            kept = self._net.remember(_batch(features), shares)
        rows = [
            kept.mask8[0],
            kept.tokens[0].flatten(1),
            kept.sums4[0].flatten(1) * SUM_SCALE,
            kept.sums2[0].flatten(1) * SUM_SCALE,
        ]
        assert features.embedding is not None
        more = [torch.from_numpy(features.embedding)]
        if self._learns_looks:
            _, tokens, *fine = features.maps
            side8 = self.size // COARSE
            more += [tokens, *(F.adaptive_avg_pool2d(one.float(), side8) for one in fine)]
        image = _in_rows(kept.descriptor[0], *more)
        return Memory(image=image.half(), labels=torch.cat(rows, 1).half().cpu())

    def study_of(self, examples: Iterable[Example]) -> Study:
        """See `ReferenceSegmenter.study_of`: the use of place by which references vote best.

        Another weight than in training's is taken where the votes for labelled slices, each left
        out in turn, are better by it: on average, and by more than half the standard error of that.
        Three slices may move it one step only, two may agree by chance. Where place counts for more
        than in training, references are aligned if the votes are better by that, too.
        """
        shown = (self._shown(example) for example in _one_of_each(examples, MOST_PLACED))
        found = [self._vote_losses(example) for example in shown if example is not None]
        found = [one for one in found if bool(one.losses.isfinite().all())]
        if len(found) < FEWEST:
            return Study()
        losses = torch.stack([one.losses for one in found]).double()
        gains = losses[:, STILL.index(1.0), None] - losses[:, : len(STILL)]
        mean, error = gains.mean(0), gains.std(0) / len(gains) ** 0.5
        if len(gains) < FEW:
            mean[[0, -1]] = 0
        mean = torch.where(mean > error / 2, mean, 0)
        if not bool((mean > 0).any()):
            return Study()
        best = int(mean.argmax())
        if STILL[best] > 1 and len(gains) >= FEW:
            rivals = [best, *range(len(STILL), len(PLACEMENTS))]
            best = rivals[int(losses[:, rivals].mean(0).argmin())]
        place, aligned = PLACEMENTS[best]
        return Study(place, aligned, REACH * max(one.distance for one in found))

    def looks_of(
        self,
        examples: Iterable[Example],
        study: Study,
        make_way: Callable[[], None] = lambda: None,
    ) -> Study:
        """See `ReferenceSegmenter.looks_of`, and `looks.py`."""
        if not self._learns_looks:
            return study
        slices = []
        try:
            for example in examples:
                make_way()
                slices.append(self._left_out(example, study))
            looks = learn_looks([one for one, _ in slices], make_way)
        except RuntimeError as error:  # a request may find room where all labels at once did not
            if not is_out_of_memory(error):
                raise
            logger.warning("how labels look cannot be learned: %s", error)
            return study
        if looks is None:
            return study
        reach = study.reach or REACH * max(distance for _, distance in slices)
        return replace(study, looks=looks, reach=reach)

    def _shown(self, example: Example) -> Example | None:
        """The labels that are on the slice."""
        cells = (self.size // COARSE) ** 2
        rows = torch.nonzero(example.memory.labels[:, :cells].any(1)).flatten()
        if not len(rows):
            return None
        return Example(
            example.image_id,
            tuple(example.labels[row] for row in rows.tolist()),
            replace(example.memory, labels=example.memory.labels[rows]),
            [replace(one, labels=one.labels[rows]) for one in example.references],
            example.known[:, rows],
        )

    @torch.inference_mode()
    def _left_out(self, example: Example, study: Study) -> tuple[LeftOut, float]:
        """A labelled slice as its references segment it, cell by cell; its distance to them."""
        side = self.size // COARSE
        cells = side**2
        similarity = self._similarity(example.references, _embedding(example.memory, cells))
        if not _within(similarity, study.reach):
            study = AS_TRAINED
        mark = _mark(example, study, cells)
        with self._answers_lock:
            scores = self._answers.pop(mark, None)
        if scores is None:
            query, told = self._as_query(example.memory), Study(study.place, study.aligned)
            found = self._segment(query, example.references, example.known, told)
            scores = F.adaptive_avg_pool2d(found.scores, side).flatten(1).T.half()
        with self._answers_lock:
            self._answers[mark] = scores
            while len(self._answers) > ANSWERS_KEPT:
                self._answers.popitem(last=False)
        left = LeftOut(
            example.image_id,
            example.labels,
            example.memory.image[:cells].clone(),  # not to hold all of the memory
            scores,
            example.memory.labels[:, :cells].T.clone(),
        )
        return left, _distance(similarity)

    def _as_query(self, memory: Memory) -> Features:
        """What `encode` made, as far as a memory has it: fine maps are smooth."""
        side, width = self.size // COARSE, self._net.config.tokens
        shapes = ((self.size // 16) ** 2, width), (FINE4, side, side), (FINE2, side, side)
        flat = memory.image[side**2 :].float().flatten()[_EMBEDDED:]
        sizes = [math.prod(shape) for shape in shapes]
        tokens, fine4, fine2 = (
            part.view(shape).to(self._device)
            for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)
        )
        descriptor = memory.image[: side**2].float().T.unflatten(1, (side, side))
        return Features(
            (
                descriptor.to(self._device),
                tokens,
                _finer(fine4, self.size // 4),
                _finer(fine2, self.size // 2),
            ),
            _embedding(memory, side**2).numpy(),
            self.fingerprint,
        )

    @torch.inference_mode()
    def _vote_losses(self, example: Example) -> _Left:
        cells = (self.size // 8) ** 2
        query = self._remembered([example.memory])
        memory = self._remembered(example.references)
        similarity = self._similarity(example.references, _embedding(example.memory, cells))
        one = Remembered(
            query.descriptor[0], query.mask8[0], query.tokens, query.sums4, query.sums2
        )
        trust, _ = self._net.trust(similarity[None])
        known = example.known.to(self._device)
        picture = one.descriptor.mT.unflatten(-1, (self.size // 8, self.size // 8))
        losses = []
        for places, moves in ((STILL, None), (ALIGNED, _moves(picture, memory, known))):
            weights = torch.tensor(places, device=self._device)
            losses.append(self._net.vote_losses(one, memory, known, trust[0], weights, moves))
        return _Left(torch.cat(losses).cpu(), _distance(similarity))

    @torch.inference_mode()
    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: Tensor,
        study: Study = AS_TRAINED,
    ) -> Prediction:
        """See `ReferenceSegmenter.segment`.

        Raises:
            RefSegError: the device has no room for them. Labels see each other's votes (which
                head to believe, the rival), so some at a time would give another result.
        """
        with _room_for(known.shape[1], len(references)):
            return self._segment(query, references, known, study)

    def _segment(
        self, query: Features, references: Sequence[Memory], known: Tensor, study: Study
    ) -> Prediction:
        assert query.embedding is not None
        similarity = self._similarity(references, torch.from_numpy(query.embedding))
        memory = self._remembered(references)
        known = known.to(self._device)
        looks = study.looks
        if looks is not None and len(looks.labels) != known.shape[1]:
            msg = (
                f"looks of {len(looks.labels)} labels for {known.shape[1]}; ask `Study.of` for them"
            )
            raise ValueError(msg)
        if not _within(similarity, study.reach):
            study, looks = AS_TRAINED, None
        moves = _moves(query.maps[0], memory, known)[None] if study.aligned else None
        output = self._net.segment(
            _batch(query),
            Remembered(*(getattr(memory, one.name)[None] for one in fields(memory))),
            known[None],
            similarity[None],
            study.place,
            moves,
        )
        scores = output.scores[0]
        if looks is not None:
            scores = corrected(scores, query.maps[0], looks.correction)
        return Prediction(
            scores=scores.cpu(),
            presence=output.presence[0].sigmoid().cpu(),
            quality=output.quality[0].sigmoid().cpu(),
        )

    def _remembered(self, references: Sequence[Memory]) -> Remembered:
        cells, tokens = (self.size // 8) ** 2, (self.size // 16) ** 2
        width = self._net.config.tokens
        rows = torch.stack([m.labels for m in references]).to(self._device).float()  # (R, L, ..)
        mask8, flat, sums4, sums2 = rows.split(
            [cells, tokens * width, 2 * (FINE4 + 1), 2 * (FINE2 + 1)], dim=-1
        )
        return Remembered(
            descriptor=torch.stack([m.image[:cells] for m in references]).to(self._device).float(),
            mask8=mask8,
            tokens=flat.unflatten(-1, (tokens, width)),
            sums4=sums4.unflatten(-1, (2, FINE4 + 1)) / SUM_SCALE,
            sums2=sums2.unflatten(-1, (2, FINE2 + 1)) / SUM_SCALE,
        )

    def _similarity(self, references: Sequence[Memory], embedding: Tensor) -> Tensor:
        """Cosines (R,) of pictures with the one that this is the embedding (E,) of."""
        cells = (self.size // 8) ** 2
        theirs = torch.stack([_embedding(m, cells) for m in references])
        return (theirs[:, : len(embedding)] @ embedding).to(self._device)

    def _fit(self, image: FloatArray) -> Tensor:
        picture = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        channels = picture.expand(3, -1, -1) if picture.ndim == 2 else picture.permute(2, 0, 1)
        side = (self.size, self.size)
        return F.interpolate(channels[None], size=side, mode="bilinear", antialias=True)[0]


class BundledEmbedder:
    """`Embedder` of the bundled network: its own encoder's maps, pooled, and a small thumbnail."""

    name = "bundled"

    def __init__(self, segmenter: MatchSegSegmenter):
        self._segmenter = segmenter
        self.fingerprint = f"pooled-{segmenter.fingerprint}"

    def embed(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """See `Embedder.embed`; features of the same network are not computed again."""
        if features is None or any(f.owner != self._segmenter.fingerprint for f in features):
            features = self._segmenter.encode(images)
        vectors = [f.embedding for f in features if f.embedding is not None]
        return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def regions(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """See `Embedder.regions`: mean descriptors, (N, REGIONS^2, C)."""
        if features is None or any(f.owner != self._segmenter.fingerprint for f in features):
            features = self._segmenter.encode(images)
        maps = torch.stack([f.maps[0].float().cpu() for f in features])
        rows: FloatArray = F.adaptive_avg_pool2d(maps, REGIONS).flatten(2).mT.numpy()
        return rows


def _one_of_each(examples: Iterable[Example], most: int) -> Iterator[Example]:
    """The first example of each image, of so many images at most; looks no further."""
    seen: set[str] = set()
    for example in examples:
        if example.image_id not in seen:
            seen.add(example.image_id)
            yield example
        if len(seen) == most:
            return


def _distance(similarity: Tensor) -> float:
    """Mean 1 - cosine of a picture and its nearest references."""
    return float(1 - similarity.topk(min(NEAREST, len(similarity))).values.mean())


def _moves(query: Tensor, memory: Remembered, known: Tensor) -> Tensor:
    """Displacements (R, P, 2) of references by all labels that they know; query (C, side, side)."""
    shares = (memory.mask8.float() * known[..., None]).sum(1).clamp_max(1)
    return displacements(query, memory.descriptor, shares)


def _within(similarity: Tensor, reach: float | None) -> bool:
    return reach is None or _distance(similarity) <= reach


@contextmanager
def _room_for(labels: int, references: int) -> Iterator[None]:
    """Turn a device out of memory into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        msg = (
            f"The GPU ran out of memory with {labels} label(s) and {references} reference(s). "
            f"{OUT_OF_MEMORY_HINT}"
        )
        raise RefSegError(msg) from error


def pooled(descriptor: Tensor, images: Tensor) -> Tensor:
    """Unit vectors (B, E): what is on the picture (mean descriptor), roughly where (thumbnail)."""
    content = F.normalize(descriptor.mean((2, 3)), dim=1)
    thumbnail = F.adaptive_avg_pool2d(images.mean(1), THUMBNAIL).flatten(1)
    thumbnail = F.normalize(thumbnail - thumbnail.mean(1, keepdim=True), dim=1, eps=1e-3)
    return F.normalize(torch.cat([content, THUMBNAIL_WEIGHT * thumbnail], 1), dim=1)


def _in_rows(descriptor: Tensor, *more: Tensor) -> Tensor:
    """Descriptors (P, C), then other values as further rows of C, filled up with zeros."""
    flat = torch.cat([one.detach().float().cpu().flatten() for one in more])
    width = descriptor.shape[1]
    return torch.cat(
        [descriptor.cpu().float(), F.pad(flat, (0, -len(flat) % width)).view(-1, width)]
    )


def _embedding(memory: Memory, cells: int) -> Tensor:
    """The first that follows the descriptors in a memory."""
    rows = -(-_EMBEDDED // memory.image.shape[1])
    return memory.image[cells : cells + rows].flatten()[:_EMBEDDED].float()


def _finer(coarse: Tensor, side: int) -> Tensor:
    return F.interpolate(coarse[None], size=(side, side), mode="bilinear")[0]


def _mark(example: Example, study: Study, cells: int) -> bytes:
    """Of all that decides how others segment a slice: pictures by their embeddings."""
    digest = blake2b(digest_size=16)
    digest.update(repr((example.labels, study.place, study.aligned)).encode())
    digest.update(example.known.numpy().tobytes())
    for memory in (example.memory, *example.references):
        digest.update(_embedding(memory, cells).numpy().tobytes())
        digest.update(memory.labels[:, :cells].contiguous().numpy().tobytes())
    return digest.digest()


def _batch(features: Features) -> Encoded:
    descriptor, tokens, fine4, fine2 = (m[None] for m in features.maps)
    return Encoded(descriptor, tokens, fine4, fine2)
