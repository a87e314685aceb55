"""What the bank gives for a query: which references, and their memories row by row."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import MemoryStoreError
from lib.examples import examples_of
from lib.memory.bank import MemoryBank
from lib.memory.reading import TensorCache
from lib.types import LabelledImage, Memory, Reference, SliceKey

LABELS = ("liver", "kidney", "spleen")
SIZE = 5


def reference(
    image_id: str, index: int, vector: np.ndarray, present: set[str], absent: set[str]
) -> Reference:
    names = sorted(present | absent)
    rows = [torch.full((2, 3), float(LABELS.index(n) + 1) if n in present else 0.0) for n in names]
    return Reference(
        key=SliceKey(image_id, 2, index),
        embedding=vector,
        present=frozenset(present),
        absent=frozenset(absent),
        memory=Memory(
            image=torch.full((4,), float(index)), labels=torch.stack(rows).to(torch.bfloat16)
        ),
    )


@st.composite
def banks(draw):
    """References by image, some labels annotated in some images only."""
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    partial = draw(st.booleans())
    images = {}
    for number in range(draw(st.integers(1, 5))):
        known = set(LABELS)
        if partial:
            known = set(generator.choice(LABELS, generator.integers(1, 4), replace=False))
        slices = []
        for index in range(generator.integers(0, 5)):
            vector = generator.standard_normal(SIZE).astype(np.float32)
            vector /= np.linalg.norm(vector)
            present = {name for name in sorted(known) if generator.random() < 0.4}
            slices.append((index, vector, present, known - present))
        images[f"image{number}"] = slices
    queries = generator.standard_normal((2, SIZE)).astype(np.float32)
    return images, queries / np.linalg.norm(queries, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def make_bank(tmp_path_factory):
    def make(images) -> tuple[MemoryBank, dict[SliceKey, Reference]]:
        folder = tmp_path_factory.mktemp("bank")
        made = {
            name: [reference(name, *spec) for spec in slices] for name, slices in images.items()
        }
        listing = []
        for name in made:
            path = folder / f"{name}.txt"
            path.write_text(name)
            listing.append(LabelledImage(name, path, path))
        bank = MemoryBank(folder / "bank", "f", lambda label: made[label.image_id])
        bank.sync(listing)
        return bank, {r.key: r for slices in made.values() for r in slices}

    return make


@settings(max_examples=20, deadline=None)
@given(
    banks(),
    st.integers(1, 6),
    st.sets(st.sampled_from([*LABELS, "unknown"])),
    st.sampled_from([None, "image0", "elsewhere"]),
    st.sampled_from([None, 1, 2]),
)
def test_every_label_gets_its_nearest_references(make_bank, case, k, labels, exclude, cap):
    images, queries = case
    bank, held = make_bank(images)
    answers = bank.nearest(
        queries, k, labels=sorted(labels), exclude_image=exclude, cap_per_case=cap
    )
    assert len(answers) == len(queries)
    for query, matches in zip(queries, answers, strict=True):
        keys = [match.key for match in matches]
        assert len(set(keys)) == len(keys)
        assert not any(key.image_id == exclude for key in keys)
        values = [match.similarity for match in matches]
        assert values == pytest.approx([held[key].embedding @ query for key in keys], abs=1e-5)
        assert values == sorted(values, reverse=True)
        wanted = [r for r in held.values() if r.key.image_id != exclude]
        for key in keys:
            assert labels & set(held[key].labels)
        for label in labels:
            knowing = sorted(
                (r for r in wanted if label in r.labels), key=lambda r: -(r.embedding @ query)
            )
            per_case = Counter(r.key.image_id for r in knowing)
            possible = sum(min(n, cap or n) for n in per_case.values())
            known = [key for key in keys if label in held[key].labels]
            assert len(known) >= min(k, possible)
            if knowing:
                assert knowing[0].key in known, "the nearest never gives way"


@settings(max_examples=12, deadline=None)
@given(banks(), st.integers(1, 6), st.sampled_from([None, 1, 2]))
def test_where_all_is_annotated_and_shown_it_is_plain_top_k(make_bank, case, k, cap):
    images, queries = case
    everything = {
        name: [(index, vector, set(LABELS), set()) for index, vector, _, _ in slices]
        for name, slices in images.items()
    }
    bank, held = make_bank(everything)
    for query, matches in zip(
        queries, bank.nearest(queries, k, labels=LABELS, cap_per_case=cap), strict=True
    ):
        wanted, taken = [], Counter()
        for r in sorted(held.values(), key=lambda r: -(r.embedding @ query)):
            if len(wanted) < k and (cap is None or taken[r.key.image_id] < cap):
                wanted.append(r.key)
                taken[r.key.image_id] += 1
        assert [match.key for match in matches] == wanted


def along(angle: float) -> np.ndarray:
    vector = np.zeros(SIZE, dtype=np.float32)
    vector[:2] = np.cos(angle), np.sin(angle)
    return vector


def test_the_farthest_gives_way_to_one_that_shows_the_label(make_bank):
    slices = [(i, along(0.01 * i), set(), {"liver"}) for i in range(6)]
    slices.append((6, along(1.0), {"liver"}, set()))
    bank, _ = make_bank({"one": slices})
    query = along(0.0)[None]
    assert [m.key.index for m in bank.nearest(query, 4, labels=["liver"])[0]] == [0, 1, 2, 6]
    assert [m.key.index for m in bank.nearest(query, 2, labels=["liver"])[0]] == [0, 6]
    assert [m.key.index for m in bank.nearest(query, 1, labels=["liver"])[0]] == [0]


def test_many_labels_elsewhere_do_not_drive_out_what_is_similar(make_bank):
    slices = [(i, along(0.01 * i), set(), set(LABELS)) for i in range(6)]
    slices += [(6 + i, along(1.0 + i / 10), {n}, set(LABELS) - {n}) for i, n in enumerate(LABELS)]
    bank, _ = make_bank({"one": slices})
    matches = bank.nearest(along(0.0)[None], 4, labels=LABELS)[0]
    assert [m.key.index for m in matches] == [0, 1, 2, 6]


def test_equal_slices_come_in_the_order_of_their_keys(make_bank):
    twin = along(0.3)
    images = {n: [(i, twin, {"liver"}, set()) for i in range(20)] for n in ("b", "a", "c")}
    bank, _held = make_bank(images)
    keys = [m.key for m in bank.nearest(twin[None], 3, labels=["liver"])[0]]
    assert keys == sorted(keys)


def test_an_empty_bank_answers_with_nothing(tmp_path: Path):
    bank = MemoryBank(tmp_path, "f", lambda label: [])
    assert bank.nearest(along(0.0)[None], 3, labels=["liver"]) == [[]]
    assert dict(bank.labels()) == {}
    assert bank.own_slices("x") == []
    assert bank.embeddings()[1].shape == (0, 0)
    memories, known = bank.load([], ["liver"])
    assert (memories, known.shape) == ([], (0, 1))
    status = bank.status()
    assert (status.images, status.slices, status.generation) == (0, 0, 0)


def test_memories_have_a_row_for_each_label_that_is_asked_for(make_bank):
    bank, _held = make_bank(
        {
            "one": [(0, along(0), {"liver"}, {"spleen"})],
            "two": [(0, along(1), {"kidney", "liver"}, set())],
        }
    )
    asked = ["spleen", "liver", "gall bladder", "kidney"]
    keys = [SliceKey("one", 2, 0), SliceKey("two", 2, 0)]
    memories, known = bank.load(keys, asked)
    assert known.tolist() == [[True, True, False, False], [False, True, False, True]]
    rows = [[float(row.mean()) for row in memory.labels] for memory in memories]
    assert rows == [[0, 1, 0, 0], [0, 1, 0, 2]]
    assert memories[0].labels.dtype == torch.bfloat16
    assert memories[0].labels.shape == (4, 2, 3)
    only_unknown, known = bank.load(keys[:1], ["gall bladder"])
    assert only_unknown[0].labels.shape == (1, 2, 3)
    assert not known.any()


def test_what_is_loaded_again_comes_from_a_cache_of_bounded_size(tmp_path):
    vectors = np.eye(SIZE, dtype=np.float32)
    made = [reference("one", i, vectors[i], {"liver"}, set()) for i in range(SIZE)]
    path = tmp_path / "one.txt"
    path.write_text("one")
    one = 4 * 4 + 2 * 6  # bytes of a slice's memory
    bank = MemoryBank(tmp_path / "bank", "f", lambda label: made, cache=TensorCache(2 * one))
    bank.sync([LabelledImage("one", path, path)])
    keys = bank.own_slices("one")
    bank.load(keys, ["liver"])
    for file in (bank.folder / "memories").iterdir():
        file.rename(file.with_suffix(".moved"))
    assert len(bank.load(keys[-2:], ["liver"])[0]) == 2, "not held"
    for file in (bank.folder / "memories").iterdir():
        file.rename(file.with_suffix(".safetensors"))
    assert len(bank.load(keys, ["liver"])[0]) == SIZE


def test_equal_rows_are_stored_once(tmp_path):
    names = [f"label{i:02}" for i in range(40)]
    label_rows = torch.zeros(40, 64, 64)
    label_rows[7] = 1
    big = Reference(
        SliceKey("one", 2, 0),
        along(0),
        frozenset(names[7:8]),
        frozenset(names) - {names[7]},
        Memory(torch.zeros(0), label_rows),
    )
    path = tmp_path / "one.txt"
    path.write_text("one")
    bank = MemoryBank(tmp_path / "bank", "f", lambda label: [big])
    bank.sync([LabelledImage("one", path, path)])
    (file,) = (bank.folder / "memories").iterdir()
    assert file.stat().st_size < 3 * 64 * 64 * 4
    memories, _ = bank.load([big.key], names)
    assert torch.equal(memories[0].labels, label_rows)


def test_large_memories_are_split_into_files_and_come_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.memory.store.SHARD_BYTES", 3000)
    made = [reference("one", i, along(i / 10), {"liver"}, set()) for i in range(7)]
    big = [
        Reference(r.key, r.embedding, r.present, r.absent, Memory(torch.rand(512), r.memory.labels))
        for r in made
    ]
    path = tmp_path / "one.txt"
    path.write_text("one")
    listing = [LabelledImage("one", path, path)]
    bank = MemoryBank(tmp_path / "bank", "f", lambda label: iter(big))
    bank.sync(listing)
    assert len(list((bank.folder / "memories").iterdir())) == 4
    for held, wanted in zip(bank.references(bank.own_slices("one")), big, strict=True):
        assert torch.equal(held.memory.image, wanted.memory.image)
    (bank.folder / "catalogue.sqlite").unlink()
    never = MemoryBank(tmp_path / "bank", "f", lambda label: pytest.fail("encoded again"))
    assert never.sync(listing).added == ("one",)
    assert never.own_slices("one") == [r.key for r in big]


def test_a_key_that_was_never_there_is_an_error(make_bank):
    bank, _ = make_bank({"one": [(0, along(0), {"liver"}, set())]})
    with pytest.raises(MemoryStoreError, match="image_id='x'.*ask for the nearest again"):
        bank.load([SliceKey("x", 2, 0)], ["liver"])


def test_more_references_than_the_exact_size_make_the_index_approximate(tmp_path):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((600, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    made = [reference("one", i, v, {"liver"}, set()) for i, v in enumerate(vectors)]
    path = tmp_path / "one.txt"
    path.write_text("one")
    bank = MemoryBank(tmp_path / "bank", "f", lambda label: made, exact_up_to=200)
    bank.sync([LabelledImage("one", path, path)])
    answers = bank.nearest(vectors[:100], 16, labels=["liver"])
    truth = np.argsort(-vectors[:100] @ vectors.T, axis=1)[:, :16]
    hits = sum(
        len({m.key.index for m in a} & set(t.tolist())) for a, t in zip(answers, truth, strict=True)
    )
    assert hits >= 0.99 * truth.size


def test_the_embeddings_of_one_image_are_its_own_rows_of_all(make_bank) -> None:
    rows = np.eye(SIZE, dtype=np.float32)
    bank, _ = make_bank(
        {"a": [(3, rows[0], {"liver"}, set()), (1, rows[1], set(), {"liver"})],
         "b": [(1, rows[2], {"liver"}, set())]}
    )  # fmt: skip
    keys, vectors = bank.embeddings("a")
    assert keys == [SliceKey("a", 2, 1), SliceKey("a", 2, 3)]
    np.testing.assert_array_equal(vectors, rows[[1, 0]])
    assert len(bank.embeddings()[0]) == 3
    assert bank.embeddings("nobody")[0] == []


@settings(max_examples=20, deadline=None)
@given(banks(), st.integers(1, 4))
def test_a_sample_takes_of_each_image_a_slice_that_shows_most_labels(make_bank, case, count):
    images, _ = case
    bank, held = make_bank(images)
    drawn = bank.sample(count)
    showing = {key.image_id for key, reference in held.items() if reference.present}
    assert len(drawn) == min(count, len(showing))
    assert len({key.image_id for key in drawn}) == len(drawn)
    for key in drawn:
        most = max(len(r.present) for r in held.values() if r.key.image_id == key.image_id)
        assert len(held[key].present) == most > 0
    assert bank.sample(count + 1)[:count] == drawn  # a larger sample goes on where this ended
    more = bank.spread(count)
    assert len(set(more)) == len(more) <= max(count, 1)
    assert bool(more) == bool(drawn)
    for key in more[: len({one.image_id for one in more} & showing)]:
        assert key in drawn  # first a slice of each
    for example in examples_of(bank):
        assert example.image_id in images
        assert len(example.labels) == len(example.memory.labels)
        assert example.known.any(0).all()
        assert len(example.memory.labels) == example.known.shape[1] > 0
        assert all(len(one.labels) == example.known.shape[1] for one in example.references)
        assert len(example.references) == len(example.known) > 0


def test_slices_are_spread_over_volumes_and_some_show_nothing(make_bank) -> None:
    rng = np.random.default_rng(0)

    def slices(shown: range, count: int = 20) -> list:
        return [
            (n, rng.standard_normal(SIZE).astype(np.float32), {"liver"} if n in shown else set(),
             set() if n in shown else {"liver"})
            for n in range(count)
        ]  # fmt: skip

    volumes = {f"v{number:02d}": slices(range(8, 12)) for number in range(30)}
    healthy = {f"w{number:02d}": slices(range(0)) for number in range(10)}
    bank, held = make_bank(volumes | healthy)
    drawn = bank.spread(48)
    assert len(set(drawn)) == len(drawn) <= 48
    empty = [key for key in drawn if not held[key].present]
    in_volumes = [key for key in empty if key.image_id.startswith("v")]
    assert len({key.image_id for key in drawn if key.image_id.startswith("v")}) == 19
    assert len(in_volumes) >= 8  # of the 19 that are not the one that shows most
    assert len(empty) - len(in_volumes) == 10
    for key in empty:
        if key not in in_volumes:
            assert key.index == 10  # of a healthy one, the middle
    bank, held = make_bank({"a": slices(range(8, 12)), "b": slices(range(8, 12))})
    drawn = bank.spread(8)
    assert [sum(key.image_id == name for key in drawn) for name in "ab"] == [4, 4]
    assert {len(held[key].present) for key in drawn} == {0, 1}
    assert max(key.index for key in drawn) - min(key.index for key in drawn) > 10
    pictures = {f"p{number}": slices(range(1), 1) for number in range(60)}
    assert len(make_bank(pictures)[0].spread(48)) == 48
    assert len(make_bank(pictures | {"v00": volumes["v00"]})[0].spread(48)) == 48
    assert make_bank(healthy)[0].spread(48) == []
