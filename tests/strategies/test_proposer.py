"""The proposer over a real pool: what a request waits for."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lib.memory.pool import EmbeddingPool
from lib.pool import Pool
from lib.retrieval.poolview import PoolView
from lib.strategies.proposer import Proposer
from lib.types import HalfArray


def encode(path: Path) -> tuple[HalfArray, list[int]]:
    rng = np.random.default_rng(int(path.stem))
    return rng.standard_normal((16, 40)).astype(np.float16), [0] * 16


def files(folder: Path, count: int) -> dict[str, Path]:
    found = {f"image {n:02}": folder / f"{n}.png" for n in range(count)}
    for n, path in enumerate(found.values()):
        if not path.exists():
            path.write_text(str(n))
    return found


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(lambda: EmbeddingPool(tmp_path / "bank", "one"), encode)


@pytest.fixture
def a_few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than four images are a large pool, looked at anew without a pause."""
    monkeypatch.setattr("lib.strategies.proposer._MANY", 4)
    monkeypatch.setattr("lib.strategies.proposer._REST", 0.0)
    monkeypatch.setattr("lib.strategies.proposer._ENOUGH", 1000)


@pytest.mark.usefixtures("a_few_are_many")
def test_of_a_large_pool_the_view_is_made_anew_behind_the_requests(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, plain = threading.Event(), pool.view

    def slowly(ids: frozenset[str]) -> PoolView:
        if len(ids) > 5:
            assert gate.wait(60)
        return plain(ids)

    monkeypatch.setattr(pool, "view", slowly)
    proposer = Proposer(pool)
    few = files(tmp_path, 5)
    assert {row.image_id for row in proposer.propose("refseg", few, {}, n=9).rows} == few.keys()
    many = files(tmp_path, 12)
    done = dict.fromkeys(few)
    found = proposer.propose("refseg", many, {}, n=20, seconds=60)
    assert {row.image_id for row in found.rows} == few.keys(), "from what was known, at once"
    assert (found.embedded, found.images) == (5, 12)
    gate.set()
    deadline = time.monotonic() + 60
    while not (found := proposer.propose("refseg", many, done, n=20, seconds=60)).rows:
        assert time.monotonic() < deadline
    assert {row.image_id for row in found.rows} == many.keys() - few.keys()
    assert (found.embedded, found.images) == (12, 12)


@pytest.mark.usefixtures("a_few_are_many")
def test_a_view_that_fails_behind_a_request_is_told_to_the_next_and_tried_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer = Proposer(pool)
    proposer.propose("refseg", files(tmp_path, 5), {})
    many, plain, failed = files(tmp_path, 12), pool.view, threading.Event()

    def fails(ids: frozenset[str]) -> PoolView:
        if failed.is_set():
            return plain(ids)
        failed.set()
        raise MemoryError

    monkeypatch.setattr(pool, "view", fails)
    proposer.propose("refseg", many, {}, seconds=60)
    assert failed.wait(60)
    time.sleep(0.5)
    with pytest.raises(MemoryError):
        proposer.propose("refseg", many, {}, seconds=60)
    deadline = time.monotonic() + 60
    while len(proposer.propose("refseg", many, {}, n=20, seconds=60).rows) < 12:
        assert time.monotonic() < deadline
