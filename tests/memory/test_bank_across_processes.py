"""Several processes at one bank, and processes that die at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib.errors import MemoryStoreError
from lib.memory.bank import MemoryBank
from tests.memory.bank_child import SETTLED_S, open_bank
from tests.memory.phantom_store import CountingEncode, PhantomStore, difference, encode

ROOT = Path(__file__).resolve().parents[2]


class Forker:
    """Starts children that have torch imported already."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.memory.bank_child"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, **command: object) -> int:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.close()


def test_killed_at_any_moment_it_comes_back_equal_to_a_fresh_rebuild(tmp_path, forker):
    chance = random.Random(0)
    store = PhantomStore(tmp_path / "studies")
    traces = 0
    for kill in range(50):
        pid = forker.ask(do="churn", folder=str(tmp_path), seed=kill)
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(forker.ask(do="wait", pid=pid))
        folder = tmp_path / "bank" / "f"
        traces += bool(list(folder.glob("staging/*/*")) or list(folder.glob("*-journal")))

        bank = open_bank(tmp_path)
        assert bank.verify() == []
        assert not list(folder.glob("staging/*/*")), "what a killed writer left is not swept"
        store.adopt_what_is_there()
        bank.sync(store.listing())
        assert difference(bank, store.listing()) == ""
        if kill % 10 == 0:
            fresh = MemoryBank(tmp_path / f"fresh{kill}", "f", encode)
            fresh.sync(store.listing())
            assert difference(fresh, store.listing()) == ""
            assert fresh.labels() == bank.labels()
            assert fresh.status().failed == bank.status().failed
    assert traces, "no child died in the middle of writing: the test proves nothing"


def test_two_processes_share_the_work_and_encode_nothing_twice(tmp_path, forker):
    store = PhantomStore(tmp_path / "studies")
    for seed in range(8):
        store.submit(f"image{seed}", seed)
    pids = [forker.ask(do="sync", folder=str(tmp_path), seconds=0.2) for _ in range(2)]
    for pid in pids:
        assert forker.ask(do="wait", pid=pid) == 0
    lines = (tmp_path / "calls.txt").read_text().splitlines()
    assert sorted(line.split()[1] for line in lines) == [f"image{seed}" for seed in range(8)]
    assert {int(line.split()[0]) for line in lines} <= set(pids)
    assert difference(open_bank(tmp_path), store.listing()) == ""


def test_a_process_sees_what_another_one_did(tmp_path, forker):
    store = PhantomStore(tmp_path / "studies")
    bank = open_bank(tmp_path)
    assert bank.embeddings()[0] == []
    for change in (
        lambda: store.submit("one", 1),
        lambda: store.submit("two", 2),
        lambda: store.submit("one", 3),
        lambda: store.delete("two"),
    ):
        change()
        pid = forker.ask(do="sync", folder=str(tmp_path), seconds=0.0)
        assert forker.ask(do="wait", pid=pid) == 0
        before = bank.version
        assert difference(bank, store.listing()) == ""
        assert bank.version == before


def test_readers_do_not_wait_for_a_long_encode(tmp_path):
    store = PhantomStore(tmp_path / "studies")
    store.submit("one", 1)
    started, finish = threading.Event(), threading.Event()

    def slow(label):
        if label.image_id == "two":
            started.set()
            finish.wait(30)
        yield from encode(label)

    bank = MemoryBank(tmp_path / "bank", "f", slow, settled_s=SETTLED_S)
    bank.sync(store.listing())
    keys, vectors = bank.embeddings()
    store.submit("two", 2)
    writer = threading.Thread(target=lambda: bank.sync(store.listing()))
    writer.start()
    assert started.wait(30)
    for reader in (bank, open_bank(tmp_path)):  # of this process, and as another one would
        assert reader.nearest(vectors, 2, labels=["liver"])[0][0].key == keys[0]
        assert len(reader.load(keys, ["liver"])[0]) == len(keys)
        assert reader.status().images == 1
        only_one = [label for label in store.listing() if label.image_id == "one"]
        assert reader.sync(only_one, complete=False).unchanged == ("one",)
    assert writer.is_alive()
    finish.set()
    writer.join(30)
    assert difference(bank, store.listing()) == ""


def test_threads_at_one_bank_agree_and_encode_nothing_twice(tmp_path):
    store = PhantomStore(tmp_path / "studies")
    for seed in range(6):
        store.submit(f"image{seed}", seed)
    calls = CountingEncode(tmp_path / "calls.txt", seconds=0.05)
    bank = MemoryBank(tmp_path / "bank", "f", calls, settled_s=SETTLED_S)
    wrong: list[str] = []

    def request() -> None:
        bank.sync(store.listing())
        wrong.append(difference(bank, store.listing()))

    threads = [threading.Thread(target=request) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [""] * 4
    assert sorted(calls.calls) == [f"image{seed}" for seed in range(6)]


def test_what_was_chosen_can_be_loaded_although_it_was_removed_since(tmp_path, forker):
    store = PhantomStore(tmp_path / "studies")
    store.submit("one", 1)
    store.submit("two", 2)
    bank = open_bank(tmp_path)
    bank.sync(store.listing())
    vectors = bank.embeddings()[1]
    keys = [match.key for match in bank.nearest(vectors[:1], 9, labels=["liver"])[0]]
    assert {key.image_id for key in keys} == {"one", "two"}
    before = bank.references(keys)[0].memory.labels
    cold = open_bank(tmp_path)  # nothing in its cache
    cold.nearest(vectors[:1], 9, labels=["liver"])
    store.delete("one")
    store.delete("two")
    pid = forker.ask(do="sync", folder=str(tmp_path), seconds=0.0)
    assert forker.ask(do="wait", pid=pid) == 0
    memory = cold.references(keys)[0].memory.labels
    assert (memory == before).all()
    assert cold.nearest(vectors[:1], 9, labels=["liver"]) == [[]]


def test_a_writer_that_hangs_is_an_error_after_the_timeout(tmp_path):
    store = PhantomStore(tmp_path / "studies")
    store.submit("one", 1)
    started, finish = threading.Event(), threading.Event()

    def hanging(label):
        started.set()
        finish.wait(30)
        yield from encode(label)

    bank = MemoryBank(tmp_path / "bank", "f", hanging, settled_s=SETTLED_S)
    writer = threading.Thread(target=lambda: bank.sync(store.listing()))
    writer.start()
    assert started.wait(30)
    impatient = MemoryBank(tmp_path / "bank", "f", encode, lock_timeout_s=0.2)
    with pytest.raises(MemoryStoreError, match="'one' for more than 0.2 s; wait for it, or end it"):
        impatient.sync(store.listing())
    finish.set()
    writer.join(30)
    assert impatient.sync(store.listing()).unchanged == ("one",)
