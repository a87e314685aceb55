"""Files that are torn, lost or foreign: one log line, and the bank is right again."""

import logging
import os
import shutil
import sqlite3

import pytest

from lib.errors import MemoryStoreError
from lib.memory.bank import MemoryBank
from tests.memory.phantom_store import CountingEncode, PhantomStore, difference


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
def open_bank(tmp_path, encode):
    return lambda: MemoryBank(tmp_path / "bank", "f", encode)


@pytest.fixture
def bank(store, open_bank):
    bank = open_bank()
    bank.sync(store.listing())
    return bank


def files(bank):
    return sorted((bank.folder / "memories").glob("*.safetensors"))


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = os.urandom(len(data) // 2 - len(data) // 3)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"not a database" * 500),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        tear,
        scribble,
    ],
    ids=["garbage", "empty", "deleted", "torn", "scribbled"],
)
@pytest.mark.parametrize("running", [False, True], ids=["at start", "while running"])
def test_a_lost_catalogue_comes_back_from_the_memories_without_encoding(
    store, bank, open_bank, encode, damage, running, caplog
):
    calls = len(encode.calls)
    damage(bank.folder / "catalogue.sqlite")
    if not running:
        bank = open_bank()
    bank.sync(store.listing())
    assert difference(bank, store.listing()) == ""
    assert len(encode.calls) == calls
    assert bank.verify() == []
    assert len([r for r in caplog.records if "made anew" in r.getMessage()]) == 1


def test_a_journal_left_by_a_dead_writer_does_not_poison_the_new_catalogue(store, bank, open_bank):
    (bank.folder / "catalogue.sqlite").write_bytes(b"garbage" * 1000)
    (bank.folder / "catalogue.sqlite-journal").write_bytes(b"garbage" * 1000)
    bank = open_bank()
    bank.sync(store.listing())
    assert difference(bank, store.listing()) == ""


@pytest.mark.parametrize(
    "damage",
    [tear, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"garbage" * 500)],
    ids=["torn", "empty", "garbage"],
)
def test_a_torn_memory_is_encoded_again_when_it_is_needed(
    store, bank, open_bank, encode, damage, caplog
):
    calls = len(encode.calls)
    damage(files(bank)[0])
    bank = open_bank()
    assert difference(bank, store.listing()) == ""
    assert len(encode.calls) == calls + 1
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert bank.verify() == []


def test_lost_memories_are_encoded_again_by_the_first_sync(store, bank, open_bank, encode):
    calls = len(encode.calls)
    for file in files(bank)[:2]:
        file.unlink()
    bank = open_bank()
    assert len(bank.sync(store.listing()).updated) == 2
    assert len(encode.calls) == calls + 2
    assert difference(bank, store.listing()) == ""


def test_verify_tells_what_is_torn_lost_or_changed(store, bank):
    one, two, three = files(bank)
    tear(one)
    two.unlink()
    data = bytearray(three.read_bytes())
    data[-1] ^= 1
    three.write_bytes(bytes(data))
    assert [sentence.split(": ")[1][:9] for sentence in bank.verify()] == [
        "its bytes",
        "No such f",
        "its bytes",
    ]
    bank.rebuild(store.listing())
    assert bank.verify() == []
    assert difference(bank, store.listing()) == ""


def test_verify_tells_a_damaged_catalogue(bank):
    (bank.folder / "catalogue.sqlite").write_bytes(b"garbage" * 1000)
    assert "file is not a database" in bank.verify()[0]


def test_a_memory_lost_together_with_its_label_is_a_sentence(store, bank, open_bank):
    keys = bank.own_slices("one")
    for file in files(bank):
        file.unlink()
    store.delete("one")
    with pytest.raises(MemoryStoreError, match="is lost"):
        open_bank().load(keys, ["liver"])


def test_files_that_no_row_names_are_swept_at_start(bank, open_bank):
    orphan = bank.folder / "memories" / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"x")
    left = bank.folder / "staging" / "ab" / "y.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    open_bank()
    assert not orphan.exists()
    assert not left.exists()


def test_another_fingerprint_has_its_own_folder_and_old_ones_can_go(tmp_path, store, bank, encode):
    other = MemoryBank(tmp_path / "bank", "sam2 tiny/1024", encode)
    assert other.embeddings()[0] == []
    other.sync(store.listing())
    assert difference(bank, store.listing()) == ""
    assert other.other_fingerprints() == [bank.folder]
    assert other.remove_other_fingerprints() == [bank.folder]
    assert not bank.folder.exists()
    assert difference(other, store.listing()) == ""


def test_a_folder_of_another_fingerprint_is_refused(tmp_path, bank, encode):
    bank.folder.rename(tmp_path / "bank" / "g")
    with pytest.raises(MemoryStoreError, match="belongs to 'f', not to 'g'"):
        MemoryBank(tmp_path / "bank", "g", encode)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path, encode):
    (tmp_path / "file").write_text("")
    with pytest.raises(MemoryStoreError, match="cannot be made.*--conf bank DIR"):
        MemoryBank(tmp_path / "file" / "bank", "f", encode)


def test_a_catalogue_that_another_program_locks_is_a_sentence(store, bank, monkeypatch):
    monkeypatch.setattr("lib.memory.catalogue._BUSY_TIMEOUT_S", 0.1)
    holder = sqlite3.connect(bank.folder / "catalogue.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(MemoryStoreError, match=r"cannot be used: database is locked"):
        bank.sync(store.listing())
    holder.close()
    assert bank.sync(store.listing()).failed == ()


def test_a_deleted_bank_folder_is_made_again(store, bank):
    shutil.rmtree(bank.folder)
    bank.sync(store.listing())
    assert difference(bank, store.listing()) == ""
