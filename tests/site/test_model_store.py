"""Versions of a site's model on the disk: whole or not there, one current, and the way back."""

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import ModelStoreError
from lib.models.network import MatchSegNet, NetworkConfig
from lib.site.store import KEPT, ModelCard, ModelStore

SMALL = NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8)


@pytest.fixture(scope="module")
def net() -> MatchSegNet:
    torch.manual_seed(0)
    return MatchSegNet(SMALL)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


def card(dice: float = 0.8) -> ModelCard:
    return ModelCard(
        dice=dice,
        dice_before=0.7,
        start="bundled",
        labels=("ball",),
        training=("a", "b", "c"),
        validation=("d",),
        options={"seed": 0},
    )


def published(store: ModelStore, net: MatchSegNet, dice: float = 0.8) -> ModelCard:
    return store.use(store.add(net, card(dice)).version)


def test_nothing_is_current_and_nothing_is_written_before_the_first_model(
    store: ModelStore,
) -> None:
    assert store.current() is None
    assert store.versions() == []
    assert not store.folder.exists()
    with pytest.raises(ModelStoreError, match="nothing to roll back"):
        store.rollback()


def test_a_stored_version_is_current_only_when_it_is_used(
    store: ModelStore, net: MatchSegNet
) -> None:
    added = store.add(net, card())
    assert (added.version, added.parent) == (1, None)
    assert store.current() is None
    store.use(1)
    assert store.current() == added
    segmenter = store.load(added, device="cpu")
    assert segmenter.digest == added.sha256
    second = published(store, net, 0.9)
    assert (second.version, second.parent) == (2, 1)
    assert store.current() == second


def test_rolling_back_leads_to_the_one_before_and_in_the_end_to_none(
    store: ModelStore, net: MatchSegNet
) -> None:
    first, second = published(store, net), published(store, net)
    assert store.rollback() == first
    assert store.current() == first
    assert [one.version for one in store.versions()] == [1, 2]  # the one left is still there
    store.use(second.version)
    assert store.current() == second
    store.rollback()
    assert store.rollback() is None
    assert store.current() is None
    third = store.add(net, card())
    assert third.version == 3  # numbers are never given again


def test_what_was_measured_is_kept_beside_what_answers(store: ModelStore, net: MatchSegNet) -> None:
    torch.manual_seed(1)
    other = MatchSegNet(SMALL)
    made = store.add(net, card(), measured=other)
    answers, measured = store.load(made, device="cpu"), store.load_measured(made, device="cpu")
    assert (answers.digest, measured.digest) == (made.sha256, made.sha256_measured)
    assert answers.digest != measured.digest
    (store.folder / "0001" / "measured.safetensors").unlink()
    assert store.load(made, device="cpu").digest == made.sha256
    with pytest.raises(ModelStoreError, match="absent"):
        store.load_measured(made, device="cpu")
    assert made.learned == ("a", "b", "c", "d")
    alone = store.add(net, card())
    path = store.folder / "0002" / "card.json"
    told = json.loads(path.read_text())
    del told["sha256_measured"]  # as cards were before there was another one
    path.write_text(json.dumps(told))
    assert store.load_measured(store.card(2), device="cpu").digest == alone.sha256
    assert store.card(2).learned == ("a", "b", "c")


def test_a_flipped_bit_is_refused_with_the_way_out(store: ModelStore, net: MatchSegNet) -> None:
    made = published(store, net)
    path = store.folder / "0001" / "weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelStoreError, match=r"model 1 are damaged.*models rollback"):
        store.load(made)
    (store.folder / "current.json").write_text("{")
    with pytest.raises(ModelStoreError, match="models use"):
        store.current()


def test_a_model_of_another_network_says_to_train_again(
    store: ModelStore, net: MatchSegNet
) -> None:
    published(store, net)
    place = store.folder / "0001"
    tensors = load_file(place / "weights.safetensors")
    tensors.pop("head.weight")
    save_file(tensors, place / "weights.safetensors", metadata={"config": json.dumps(vars(SMALL))})
    digest = hashlib.sha256((place / "weights.safetensors").read_bytes()).hexdigest()
    raw = json.loads((place / "card.json").read_text())
    (place / "card.json").write_text(json.dumps({**raw, "sha256": digest}))
    with pytest.raises(ModelStoreError, match="another version of RefSeg; train again"):
        store.load(store.card(1))


def test_old_versions_go_with_the_banks_that_they_alone_made(
    store: ModelStore, net: MatchSegNet, tmp_path: Path
) -> None:
    banks = tmp_path / "banks"
    for number in range(KEPT + 1):
        made = published(store, net)
        for bank in (f"own-{number}", "shared"):
            (banks / bank).mkdir(parents=True, exist_ok=True)
            store.note_bank(made, bank)
        store.note_bank(made, "shared")  # twice is once
    assert json.loads((store.folder / "0001" / "banks.json").read_text()) == ["own-0", "shared"]
    assert store.prune(banks) == [1]
    assert sorted(path.name for path in banks.iterdir()) == ["own-1", "own-2", "own-3", "shared"]
    assert [one.version for one in store.versions()] == [2, 3, 4]
    assert store.current() is not None
    for _ in range(KEPT - 1):
        assert store.rollback() is not None
    assert store.rollback() is None


def test_where_the_disk_takes_no_more_no_version_appears(
    store: ModelStore, net: MatchSegNet
) -> None:
    """A child whose files may hold a few bytes: the kernel refuses the rest, as a full disk."""
    published(store, net)
    child = """
import resource, signal, sys, torch
from lib.errors import ModelStoreError
from lib.site.store import ModelStore
from tests.site.test_model_store import MatchSegNet, SMALL, card
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (200_000, 1000, 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        ModelStore(Path(sys.argv[1])).add(MatchSegNet(SMALL), card())
    except ModelStoreError as error:
        sys.stdout.write(str(error) + chr(10))
"""
    done = subprocess.run(
        [sys.executable, "-c", child, str(store.folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    told = done.stdout.splitlines()
    assert len(told) == 3, done.stderr
    assert all("could not be stored" in line and "Make room" in line for line in told[:2])
    left = sorted(path.name for path in store.folder.iterdir() if path.is_dir())
    assert left == ["0001"]
    assert store.current() is not None


def test_readers_see_only_whole_pointers_while_it_is_moved(
    store: ModelStore, net: MatchSegNet
) -> None:
    published(store, net)
    published(store, net)
    stop, problems = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                found = ModelStore(store.folder).current()
                assert found is not None
                assert found.version in (1, 2)
            except Exception as error:  # noqa: BLE001 - told by the test's own thread
                problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        store.use(1 + number % 2)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
