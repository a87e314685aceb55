"""The bank against a dict: whatever is done to the files, the very next sync sees the truth."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lib.errors import MemoryStoreError
from lib.memory.bank import MemoryBank
from lib.types import LabelledImage
from tests.memory.phantom_store import (
    WORDS,
    CountingEncode,
    PhantomStore,
    difference,
    expected,
)
from tests.memory.phantom_store import encode as encode_quickly

IDS = st.sampled_from(["a", "b c", "d.e", "é%f", "g"])
SEEDS = st.integers(0, 3)  # few, so that equal contents meet
SETTLED_S = 0.02


def overwrite_in_place(path: Path, data: bytes) -> None:
    """As a careless script does: same file, and its time set back."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.truncate(0)
        stream.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class BankBesideADatastore(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="bank-"))
        self.store = PhantomStore(self.folder / "studies")
        self.encode = CountingEncode(self.folder / "calls.txt")
        self.bank: MemoryBank | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(image_id=IDS, seed=SEEDS, label_seed=SEEDS, slices=st.integers(1, 3))
    def submit_or_drop_by_hand(self, image_id, seed, label_seed, slices):
        self.store.submit(image_id, seed, slices=slices, label_seed=label_seed)

    @precondition(lambda self: self.store.names)
    @rule(data=st.data(), seed=st.integers(10, 13))
    def overwrite_with_same_size_and_restored_time(self, data, seed):
        path = self.store.label(data.draw(st.sampled_from(sorted(self.store.names))))
        masks = np.load(path, allow_pickle=False) if path.stat().st_size > 200 else None
        if masks is not None:
            other = np.random.default_rng(seed).permutation(masks.ravel()).reshape(masks.shape)
            twin = self.folder / "twin.npy"
            np.save(twin, other)
            overwrite_in_place(path, twin.read_bytes())

    @precondition(lambda self: self.store.names)
    @rule(data=st.data())
    def break_a_label(self, data):
        self.store.label(data.draw(st.sampled_from(sorted(self.store.names)))).write_bytes(b"torn")

    @precondition(lambda self: self.store.names)
    @rule(data=st.data(), names=st.sampled_from([WORDS, {1: "tumor"}, {}]))
    def name_the_labels_otherwise(self, data, names):
        self.store.names[data.draw(st.sampled_from(sorted(self.store.names)))] = names

    @precondition(lambda self: self.store.names)
    @rule(data=st.data())
    def touch(self, data):
        self.store.label(data.draw(st.sampled_from(sorted(self.store.names)))).touch()

    @precondition(lambda self: self.store.names)
    @rule(data=st.data(), new=IDS)
    def rename(self, data, new):
        if new not in self.store.names:
            self.store.rename(data.draw(st.sampled_from(sorted(self.store.names))), new)

    @precondition(lambda self: self.store.names)
    @rule(data=st.data())
    def delete(self, data):
        self.store.delete(data.draw(st.sampled_from(sorted(self.store.names))))

    @precondition(lambda self: self.store.names)
    @rule(data=st.data())
    def lose_the_image_file(self, data):
        image_id = data.draw(st.sampled_from(sorted(self.store.names)))
        self.store.image(image_id).unlink(missing_ok=True)
        (self.store.folder / f"{image_id}.npy").touch()

    @rule()
    def wait_until_times_can_be_trusted(self):
        time.sleep(SETTLED_S + 0.01)

    @rule()
    def stop_the_server(self):
        self.bank = None

    @rule()
    def the_next_request_sees_the_truth(self):
        if self.bank is None:
            self.bank = MemoryBank(self.folder / "bank", "f", self.encode, settled_s=SETTLED_S)
        listing = self.store.listing()
        report = self.bank.sync(listing)
        assert difference(self.bank, listing) == ""
        good = {key.image_id for key in expected(listing)}
        assert {image_id for image_id, _ in report.failed}.isdisjoint(good)
        parts = [*report.added, *(new for _, new in report.renamed), *report.updated]
        parts += [*report.unchanged, *(image_id for image_id, _ in report.failed)]
        assert sorted(parts) == sorted(self.store.names)
        assert self.bank.verify() == []

        calls = len(self.encode.calls)
        again = self.bank.sync(listing)
        assert not again.changed
        assert again.failed == report.failed
        assert again.generation == self.bank.version.generation
        assert len(self.encode.calls) == calls

    @invariant()
    def no_file_is_left_that_no_row_names_and_no_work_either(self):
        if self.bank is not None:
            assert not list((self.bank.folder / "staging").glob("*/*"))


BankBesideADatastore.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBankBesideADatastore = BankBesideADatastore.TestCase


@pytest.fixture
def store(tmp_path):
    store = PhantomStore(tmp_path / "studies")
    for seed, image_id in enumerate(["one", "two", "three"]):
        store.submit(image_id, seed)
    return store


@pytest.fixture
def encode(tmp_path):
    return CountingEncode(tmp_path / "calls.txt")


@pytest.fixture
def bank(tmp_path, store, encode):
    bank = MemoryBank(tmp_path / "bank", "f", encode, settled_s=SETTLED_S)
    bank.sync(store.listing())
    return bank


def test_a_first_sync_adds_all_and_a_second_does_nothing(tmp_path, store, encode):
    bank = MemoryBank(tmp_path / "bank", "f", encode, settled_s=SETTLED_S)
    assert bank.sync([]).generation == 0
    assert bank.sync(store.listing()).added == ("one", "three", "two")
    report = bank.sync(store.listing())
    assert report.unchanged == ("one", "three", "two")
    assert not report.changed
    assert sorted(encode.calls) == ["one", "three", "two"]


def test_a_settled_file_is_not_read_again(store, bank):
    time.sleep(SETTLED_S + 0.01)
    bank.sync(store.listing())  # takes over signatures that can be trusted
    held = {path: path.stat().st_atime_ns for path in store.labels_folder.iterdir()}
    for path in held:
        os.utime(path, ns=(0, path.stat().st_mtime_ns))  # so that a read would show
    time.sleep(SETTLED_S + 0.01)
    bank.sync(store.listing())
    times = [path.stat().st_atime_ns for path in held]
    bank.sync(store.listing())
    assert [path.stat().st_atime_ns for path in held] == times


def test_an_overwrite_that_hides_its_size_and_time_is_seen_hours_later(store, bank):
    time.sleep(SETTLED_S + 0.01)
    bank.sync(store.listing())  # signatures can be trusted now
    masks = np.load(store.label("one"))
    header = store.label("one").read_bytes()[: -masks.size]
    overwrite_in_place(store.label("one"), header + masks[::-1].tobytes())
    time.sleep(SETTLED_S + 0.01)
    assert bank.sync(store.listing()).updated == ("one",)
    assert difference(bank, store.listing()) == ""


def test_a_rename_moves_rows_without_encoding(store, bank, encode):
    calls = len(encode.calls)
    store.rename("one", "uno")
    report = bank.sync(store.listing())
    assert report.renamed == (("one", "uno"),)
    assert (report.added, report.removed, report.updated) == ((), (), ())
    assert len(encode.calls) == calls
    assert bank.own_slices("one") == []
    assert difference(bank, store.listing()) == ""


def test_a_copy_under_a_second_id_is_not_encoded_either(store, bank, encode):
    calls = len(encode.calls)
    shutil.copy(store.image("one"), store.image("copy"))
    shutil.copy(store.label("one"), store.label("copy"))
    store.names["copy"] = store.names["one"]
    assert bank.sync(store.listing()).added == ("copy",)
    assert len(encode.calls) == calls
    store.delete("one")
    assert bank.sync(store.listing()).removed == ("one",)
    assert difference(bank, store.listing()) == ""


def test_swapped_contents_are_two_updates_without_encoding(store, bank, encode):
    calls = len(encode.calls)
    for path in (store.image, store.label):
        path("one").rename(path("x"))
        path("two").rename(path("one"))
        path("x").rename(path("two"))
    assert bank.sync(store.listing()).updated == ("one", "two")
    assert len(encode.calls) == calls
    assert difference(bank, store.listing()) == ""


def test_deleted_and_submitted_again_is_not_encoded_twice(store, bank, encode):
    calls = len(encode.calls)
    listing = store.listing()
    assert bank.sync(listing[:2]).removed == ("two",)
    assert bank.own_slices("two") == []
    assert bank.sync(listing).added == ("two",)
    assert len(encode.calls) == calls


def test_other_names_for_the_values_are_an_update(store, bank):
    store.names["one"] = {1: "pancreas"}
    assert bank.sync(store.listing()).updated == ("one",)
    assert "pancreas" in bank.labels()
    assert difference(bank, store.listing()) == ""


def test_a_broken_label_fails_with_its_sentence_and_stops_no_other(store, bank, encode):
    store.label("one").write_bytes(b"torn")
    store.submit("four", 4)
    report = bank.sync(store.listing())
    assert report.added == ("four",)
    assert report.removed == ("one",)
    assert [image_id for image_id, _ in report.failed] == ["one"]
    assert "one.npy is not an array" in report.failed[0][1]
    assert bank.status().failed == report.failed
    assert bank.own_slices("one") == []

    calls = len(encode.calls)
    time.sleep(SETTLED_S + 0.01)
    assert bank.sync(store.listing()).failed == report.failed
    assert len(encode.calls) == calls, "tried again although nothing changed"
    store.submit("one", 0)
    assert bank.sync(store.listing()).added == ("one",)
    assert bank.status().failed == ()


def test_an_unexpected_error_stops_no_other_and_is_tried_again(tmp_path, store, caplog):
    out_of_memory = ["two"]

    def encode_or_not(label: LabelledImage):
        if label.image_id in out_of_memory:
            raise RuntimeError("out of memory")
        yield from encode_quickly(label)

    bank = MemoryBank(tmp_path / "bank", "f", encode_or_not, settled_s=SETTLED_S)
    report = bank.sync(store.listing())
    assert report.added == ("one", "three")
    assert report.failed == (
        ("two", "it could not be encoded (RuntimeError: out of memory); see the log"),
    )
    assert "could not be encoded" in caplog.text
    out_of_memory.clear()
    assert bank.sync(store.listing()).added == ("two",)


def test_a_full_disk_is_the_banks_error_and_no_images_failure(tmp_path, store, monkeypatch):
    bank = MemoryBank(tmp_path / "bank", "f", encode_quickly, settled_s=SETTLED_S)
    (bank.folder / "staging").write_text("no folder can be made here")
    with pytest.raises(MemoryStoreError, match="cannot be written.*free disk space"):
        bank.sync(store.listing())
    (bank.folder / "staging").unlink()
    assert bank.sync(store.listing()).added == ("one", "three", "two")


def test_a_vanished_file_fails_with_a_sentence_that_says_what_to_do(store, bank):
    listing = store.listing()
    store.image("one").unlink()
    ((image_id, sentence),) = bank.sync(listing).failed
    assert image_id == "one"
    assert "one.npy cannot be read: No such file" in sentence
    assert "restore it" in sentence


def test_a_label_that_changes_while_it_is_encoded_ends_up_right(tmp_path, store):
    calls = []

    def slow(label: LabelledImage):
        references = list(encode_quickly(label))
        if not calls:
            store.submit(label.image_id, 77)
        calls.append(label.image_id)
        return references

    bank = MemoryBank(tmp_path / "bank", "f", slow, settled_s=SETTLED_S)
    bank.sync(store.listing()[:1])
    assert len(calls) == 2
    assert difference(bank, store.listing()[:1]) == ""


def test_some_labels_only_remove_nothing(store, bank):
    store.submit("one", 50)
    report = bank.sync(store.listing()[:1], complete=False)
    assert report.updated == ("one",)
    assert report.removed == ()
    assert difference(bank, store.listing()) == ""


def test_a_dicom_folder_is_an_image(tmp_path, store, encode):
    series = tmp_path / "series"
    series.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        (series / f"{number}.dcm").write_bytes(generator.bytes(50))

    def encode_folder(label: LabelledImage):
        twin = LabelledImage(label.image_id, store.image("one"), label.label_path, WORDS)
        return encode(twin)

    label = LabelledImage("dicom", series, store.label("one"), WORDS)
    bank = MemoryBank(tmp_path / "bank", "f", encode_folder, settled_s=SETTLED_S)
    assert bank.sync([label]).added == ("dicom",)
    assert bank.sync([label]).unchanged == ("dicom",)
    time.sleep(SETTLED_S + 0.01)
    overwrite_in_place(series / "1.dcm", generator.bytes(50))
    assert bank.sync([label]).updated == ("dicom",)
    (series / "2.dcm").unlink()
    assert bank.sync([label]).updated == ("dicom",)


def test_a_rebuild_encodes_all_anew_and_readers_never_see_less(store, bank, encode):
    calls = len(encode.calls)
    before = bank.embeddings()
    seen = []
    original = encode.__class__.__call__

    def watching(label):
        seen.append(len(bank.embeddings()[0]))
        return original(encode, label)

    again = MemoryBank(bank.folder.parent, "f", watching, settled_s=SETTLED_S)
    assert again.rebuild(store.listing()).updated == ("one", "three", "two")
    assert len(encode.calls) == calls + 3
    assert set(seen) == {len(before[0])}
    assert difference(bank, store.listing()) == ""
