"""The catalogue in memory: who is where, and the nearest references of a query slice."""

import heapq
import sqlite3
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

from lib.memory.packing import StoredSlice, from_text
from lib.memory.records import LabelCount
from lib.retrieval.index import IdArray, VectorIndex
from lib.retrieval.selection import top_k
from lib.types import FloatArray, Match, Shape, SliceKey

_GONE_KEPT = 20_000
_TIES_LOOKED_AT = 8
_LOOKED_AT = 4  # images for each that is drawn: some show no label
_PHASES = 997

Found = list[tuple[int, float]]


@dataclass(frozen=True, eq=False)
class Entry:
    """One reference slice under the id that it has in the index."""

    id: int
    key: SliceKey
    stored: StoredSlice


@dataclass(frozen=True, eq=False)
class _Group:
    """Labels that are annotated on the same references."""

    labels: list[str]
    candidates: IdArray


class View:
    """References of one generation. Not thread-safe: the bank holds its lock around all of it."""

    def __init__(self, make_index: Callable[[], VectorIndex]) -> None:
        self._make_index = make_index
        self._state: tuple[str, int] = ("", -1)
        self._clear()

    def _clear(self) -> None:
        self._index = self._make_index()
        self._entries: dict[int, Entry] = {}
        self._by_image: dict[str, dict[SliceKey, int]] = {}
        self._images: dict[int, tuple[int, str, list[int]]] = {}  # row -> generation, id, entries
        self._gone: OrderedDict[SliceKey, Entry] = OrderedDict()
        self._annotated: dict[str, IdArray] | None = None
        self._present: dict[str, IdArray] = {}

    @property
    def state(self) -> tuple[str, int]:
        """The catalogue that this view was read from, and its generation."""
        return self._state

    def refresh(self, connection: sqlite3.Connection) -> None:
        """Take over what changed in the catalogue since the last time, and only that."""
        meta = dict(connection.execute("SELECT name, value FROM meta"))
        state = (str(meta["incarnation"]), int(meta["generation"]))
        if state == self._state:
            return
        if state[0] != self._state[0]:
            self._clear()
        live = {
            row: (generation, image_id)
            for row, generation, image_id in connection.execute(
                "SELECT id, generation, image_id FROM images "
                "WHERE removed_at IS NULL AND error IS NULL"
            )
        }
        for row in [r for r, held in self._images.items() if live.get(r) != held[:2]]:
            self._drop(row)
        self._take(connection, {row: held for row, held in live.items() if row not in self._images})
        self._annotated = None
        self._state = state

    def _drop(self, row: int) -> None:
        _, image_id, ids = self._images.pop(row)
        self._index.remove(np.array(ids, dtype=np.int64))
        for number in ids:
            entry = self._entries.pop(number)
            self._gone[entry.key] = entry
        self._by_image.pop(image_id, None)
        while len(self._gone) > _GONE_KEPT:
            self._gone.popitem(last=False)

    def _take(self, connection: sqlite3.Connection, images: dict[int, tuple[int, str]]) -> None:
        ids: list[int] = []
        vectors: list[FloatArray] = []
        groups: list[int] = []
        for row, (generation, image_id) in images.items():
            by_key: dict[SliceKey, int] = {}
            for number, text, blob, file, position in connection.execute(
                "SELECT id, spec, embedding, file, position FROM slices WHERE image = ?", (row,)
            ):
                stored = from_text(text, np.frombuffer(blob, dtype=np.float32), file, position)
                key = SliceKey(image_id, stored.axis, stored.index)
                self._entries[number] = Entry(number, key, stored)
                by_key[key] = number
                vectors.append(stored.embedding)
            self._images[row] = (generation, image_id, list(by_key.values()))
            self._by_image[image_id] = by_key
            ids += by_key.values()
            groups += [row] * len(by_key)
        if ids:
            self._index.add(
                np.array(ids, dtype=np.int64), np.stack(vectors), np.array(groups, dtype=np.int64)
            )

    def entries(self) -> Iterator[Entry]:
        """All references, in the order of their keys."""
        for image_id in sorted(self._by_image):
            for key in sorted(self._by_image[image_id]):
                yield self._entries[self._by_image[image_id][key]]

    def keys_of(self, image_id: str) -> list[SliceKey]:
        """The slices of one image, sorted."""
        return sorted(self._by_image.get(image_id, {}))

    def sample(self, count: int) -> list[SliceKey]:
        """See `MemoryBank.sample`."""
        drawn = heapq.nsmallest(_LOOKED_AT * count, self._by_image, key=_draw)
        found = []
        for image_id in drawn:
            ids = self._by_image[image_id]
            shown = {key: len(self._entries[ids[key]].stored.present) for key in sorted(ids)}
            if any(shown.values()):  # an image may teach nothing, or that nothing is there
                found.append(max(shown, key=shown.__getitem__))
        return found[:count]

    def spread(self, count: int) -> list[SliceKey]:
        """See `MemoryBank.spread`."""
        drawn = self.sample(count)
        if not drawn:
            return []
        images = heapq.nsmallest(count, self._by_image, key=_draw)
        blank = [image for image in images if self._by_image[image] and not self._shows(image)]
        blank = blank[: count // 4]
        left = max(1, count - len(blank))
        volumes = any(len(self._by_image[key.image_id]) > 1 for key in drawn)
        found = drawn[: max(1, left // 2) if volumes else left]
        each = (left - len(found)) // len(found)
        more: list[SliceKey] = []
        for first in found:
            others = [key for key in self.keys_of(first.image_id) if key != first]
            taken = min(each, len(others))
            # of one slice a volume not always the middle one, and the same when others come
            phase = _draw(first.image_id)[0] % _PHASES / _PHASES
            more += [others[int((n + phase) * len(others) / taken)] for n in range(taken)]
        slices = [self.keys_of(image) for image in blank]
        return drawn[: left - len(more)] + more + [keys[len(keys) // 2] for keys in slices]

    def _shows(self, image_id: str) -> bool:
        numbers = self._by_image[image_id].values()
        return any(self._entries[number].stored.present for number in numbers)

    def find(self, key: SliceKey) -> Entry | None:
        """A reference, also one that was dropped a moment ago: its file is still there."""
        number = self._by_image.get(key.image_id, {}).get(key)
        return self._gone.get(key) if number is None else self._entries[number]

    def counts(self) -> dict[str, LabelCount]:
        """For each label on how many slices it is present and absent."""
        annotated = self._annotated_ids()
        return {
            label: LabelCount(len(self._present[label]), len(ids) - len(self._present[label]))
            for label, ids in sorted(annotated.items())
        }

    def shapes(self) -> dict[str, list[Shape]]:
        """For each label what its masks look like, slice by slice."""
        found: dict[str, list[Shape]] = defaultdict(list)
        for entry in self._entries.values():
            for label, shape in entry.stored.shapes.items():
                found[label].append(shape)
        return found

    def annotated(self) -> dict[str, frozenset[str]]:
        """For each image the labels that it says anything of."""
        found: dict[str, set[str]] = defaultdict(set)
        for entry in self._entries.values():
            found[entry.key.image_id].update(entry.stored.present, entry.stored.absent)
        return {image_id: frozenset(names) for image_id, names in found.items()}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def images(self) -> int:
        """How many images have been read without an error."""
        return len(self._images)

    def nearest(
        self,
        queries: FloatArray,
        k: int,
        *,
        labels: Sequence[str],
        exclude_image: str | None,
        cap_per_case: int | None,
    ) -> list[list[Match]]:
        """See `MemoryBank.nearest`."""
        found: list[dict[int, float]] = [{} for _ in queries]
        for group in self._groups(labels, exclude_image):
            chosen = self._top(queries, group.candidates, k, cap_per_case)
            self._prefer_present(queries, chosen, group, k, cap_per_case)
            for query, matches in zip(found, chosen, strict=True):
                query.update(matches)
        answers = []
        for query in found:
            ids = list(query)
            keys = [self._entries[number].key for number in ids]
            similarities = np.array([query[number] for number in ids], dtype=np.float32)
            order = top_k(similarities, keys, len(ids), ties=keys)
            answers.append([Match(keys[i], float(similarities[i])) for i in order])
        return answers

    def _annotated_ids(self) -> dict[str, IdArray]:
        """Sorted ids of the references that know each label; `_present` is made along with it."""
        if self._annotated is None:
            annotated: dict[str, list[int]] = defaultdict(list)
            present: dict[str, list[int]] = defaultdict(list)
            for number in sorted(self._entries):
                stored = self._entries[number].stored
                for label in (*stored.present, *stored.absent):
                    annotated[label].append(number)
                for label in stored.present:
                    present[label].append(number)
            self._annotated = {k: np.array(v, dtype=np.int64) for k, v in annotated.items()}
            self._present = {k: np.array(present[k], dtype=np.int64) for k in annotated}
        return self._annotated

    def _groups(self, labels: Iterable[str], exclude_image: str | None) -> list[_Group]:
        own = self._own_ids(exclude_image)
        groups: dict[bytes, _Group] = {}
        annotated = self._annotated_ids()
        for label in dict.fromkeys(labels):
            if label not in annotated:
                continue
            candidates = np.setdiff1d(annotated[label], own, assume_unique=True)
            if len(candidates):
                group = groups.setdefault(candidates.tobytes(), _Group([], candidates))
                group.labels.append(label)
        return list(groups.values())

    def _own_ids(self, image_id: str | None) -> IdArray:
        own = self._by_image.get(image_id, {}) if image_id is not None else {}
        return np.array(sorted(own.values()), dtype=np.int64)

    def _top(
        self, queries: FloatArray, candidates: IdArray, k: int, cap: int | None
    ) -> list[Found]:
        """The k nearest of each query, looked for ever farther until the cap leaves k of them."""
        answers: list[Found] = [[] for _ in queries]
        waiting = list(range(len(queries)))
        reach = k + _TIES_LOOKED_AT if cap is None else 4 * k + _TIES_LOOKED_AT
        while waiting:
            similarities, ids = self._index.search(queries[waiting], reach, within=candidates)
            still = []
            for query, row, values in zip(waiting, ids.tolist(), similarities, strict=True):
                numbers = [number for number in row if number >= 0]
                keys = [self._entries[number].key for number in numbers]
                cases = [key.image_id for key in keys]
                order = top_k(values[: len(keys)], cases, k, cap_per_case=cap, ties=keys)
                answers[query] = [(numbers[i], float(values[i])) for i in order]
                if len(order) < k and reach < len(candidates):
                    still.append(query)
            waiting = still
            reach *= 4
        return answers

    def _prefer_present(
        self, queries: FloatArray, chosen: list[Found], group: _Group, k: int, cap: int | None
    ) -> None:
        """Replace the farthest matches so that each label is present in one, within reason.

        At most a quarter of the k (at least one of two) gives way, to the most similar offers
        first: a label that none of the nearest shows is most often not on the slice, and with
        many labels nothing similar would be left.
        """
        if k < 2:
            return
        shows = {label: set(self._present[label].tolist()) for label in group.labels}
        offers: list[list[tuple[float, int, str]]] = [[] for _ in queries]
        for label in group.labels:
            lacking = [
                query
                for query, matches in enumerate(chosen)
                if not any(number in shows[label] for number, _ in matches)
            ]
            candidates = np.intersect1d(self._present[label], group.candidates, assume_unique=True)
            if not lacking or not len(candidates):
                continue
            similarities, ids = self._index.search(queries[lacking], 1, within=candidates)
            for query, value, number in zip(lacking, similarities[:, 0], ids[:, 0], strict=True):
                if number >= 0:
                    offers[query].append((float(value), int(number), label))
        for matches, offered in zip(chosen, offers, strict=True):
            left = max(1, k // 4)
            inserted: set[int] = set()
            for value, number, label in sorted(offered, key=lambda o: (-o[0], o[1])):
                if left and not any(held in shows[label] for held, _ in matches):
                    place = self._replaceable(matches, inserted, shows, number, cap)
                    if place is not None:
                        matches[place] = (number, value)
                        inserted.add(number)
                        left -= 1

    def _replaceable(
        self,
        matches: Found,
        inserted: set[int],
        shows: dict[str, set[int]],
        newcomer: int,
        cap: int | None,
    ) -> int | None:
        """The last match that is not the only one to show some label, and whose place is free."""
        case = self._entries[newcomer].key.image_id
        cases = Counter(self._entries[number].key.image_id for number, _ in matches)
        for place in range(len(matches) - 1, 0, -1):
            number = matches[place][0]
            same_case = self._entries[number].key.image_id == case
            if number in inserted or (cap is not None and not same_case and cases[case] >= cap):
                continue
            others = {held for held, _ in matches if held != number}
            if all(number not in show or others & show for show in shows.values()):
                return place
        return None


def _draw(image_id: str) -> tuple[int, str]:
    """A lot that is the same whatever other images there are."""
    return crc32(image_id.encode()), image_id


def embedding_matrix(entries: Sequence[Entry]) -> npt.NDArray[np.float32]:
    """(N, E) of entries; (0, 0) of none."""
    if not entries:
        return np.zeros((0, 0), dtype=np.float32)
    return np.stack([entry.stored.embedding for entry in entries])
