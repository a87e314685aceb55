"""Embedding by many workers, some of which are killed by images; networks are not needed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lib.embedding
from lib.embedding import (
    KILLER,
    WORKERS_DIED,
    Embedded,
    embed_by_dask,
    embed_here,
    embed_in_processes,
)
from lib.errors import RequestError
from lib.settings import RefSegSettings

ROOT = Path(__file__).resolve().parents[1]
Conf = tuple[tuple[str, str], ...]


def embed_unless_it_kills(conf: Conf, image_id: str, path: str) -> Embedded:
    """In place of `embed_one`, in the workers."""
    if image_id.startswith("killer"):
        os.kill(os.getpid(), signal.SIGKILL)
    if image_id.startswith("odd"):
        raise RuntimeError(f"cannot allocate {path}")
    return Embedded(image_id, np.ones((1, 2), np.float32), (0,))


def warm_up_well(conf: Conf) -> None:
    """In place of `warm_up`."""


def die_while_warming_up(conf: Conf) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def same_networks(conf: Conf) -> str:
    """In place of `fingerprint_of`."""
    return "the same"


@pytest.fixture(autouse=True)
def _no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.embedding, "embed_one", embed_unless_it_kills)
    monkeypatch.setattr(lib.embedding, "warm_up", warm_up_well)
    monkeypatch.setattr(lib.embedding, "fingerprint_of", same_networks)
    monkeypatch.setattr(lib.embedding, "_share_cores", warm_up_well)  # would import torch


def paths(*names: str) -> dict[str, Path]:
    return {name: Path(name) for name in names}


def told(found: Iterator[Embedded]) -> dict[str, str]:
    """Image -> its error, each image once."""
    rows = list(found)
    assert len({row.image_id for row in rows}) == len(rows)
    assert all((row.vectors is None) == bool(row.error) for row in rows)
    return {row.image_id: row.error for row in rows}


def test_images_that_kill_their_workers_are_named_and_all_others_are_embedded() -> None:
    killers = ["killer a", "killer b", "killer c"]
    names = [*killers, *(f"image {n}" for n in range(6)), "killer d", "image 6"]
    found = told(embed_in_processes(RefSegSettings(device="cpu"), paths(*names), 2))
    assert found.keys() == set(names)
    assert {name for name, error in found.items() if error == KILLER} == {*killers, "killer d"}
    assert not any(found[name] for name in names if name.startswith("image"))


def test_workers_that_die_without_an_image_end_the_run_and_blame_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lib.embedding, "warm_up", die_while_warming_up)
    with pytest.raises(RequestError, match="before they were given any image"):
        list(embed_in_processes(RefSegSettings(device="cpu"), paths("killer", "image"), 2))


def test_what_an_image_meets_in_a_network_is_told_of_that_image(tmp_path: Path) -> None:
    class Full:
        def embed_file(self, path: Path) -> tuple[object, list[int]]:
            if path.name == "odd":
                raise MemoryError("cannot allocate 90 GB")
            return np.ones((1, 2), np.float32), [0]

    found = told(embed_here(Full(), paths("odd", "image")))  # type: ignore[arg-type]
    assert found == {"odd": "MemoryError: cannot allocate 90 GB", "image": ""}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two workers of Dask that come back when they die."""
    import dask
    from distributed import LocalCluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as one,
    ):
        yield one.scheduler_address


def test_dask_tells_of_an_image_that_kills_its_workers_and_of_one_that_cannot_be_read(
    cluster: str,
) -> None:
    names = ["odd", *(f"image {n}" for n in range(20)), "killer"]
    found = told(embed_by_dask(RefSegSettings(device="cpu"), paths(*names), cluster))
    assert found.keys() == set(names)
    assert "workers that read it died, 2 of them" in found["killer"]
    assert found["odd"] == "RuntimeError: cannot allocate odd"
    assert not any(found[name] for name in names if name.startswith("image"))


def test_an_image_that_only_waited_where_a_worker_died_is_not_blamed(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = lib.embedding._answer_of
    suspected = {"image 1"}  # once, as Dask does with all that a worker was to do

    def suspecting(future: object, image_id: str) -> Embedded:
        if image_id in suspected:
            suspected.remove(image_id)
            return Embedded(image_id, None, (), f"{WORKERS_DIED}, 2 of them")
        return answers(future, image_id)

    monkeypatch.setattr(lib.embedding, "_answer_of", suspecting)
    names = [*(f"image {n}" for n in range(4)), "killer"]
    found = told(embed_by_dask(RefSegSettings(device="cpu"), paths(*names), cluster))
    assert {name for name, error in found.items() if error} == {"killer"}


def test_when_no_worker_of_dask_is_left_the_run_ends_with_a_sentence(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    monkeypatch.setattr(lib.embedding, "DASK_LOOK_S", 1.0)
    found = embed_by_dask(RefSegSettings(device="cpu"), paths("image 0", "image 1"), cluster)
    with Client(cluster) as client:
        monkeypatch.setattr(
            lib.embedding,
            "_compare_networks",
            lambda *_: client.retire_workers(list(client.scheduler_info()["workers"])),
        )
        with pytest.raises(RequestError, match="No worker is left"):
            list(found)


def test_without_dask_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.embedding, "find_spec", lambda _: None)
    with pytest.raises(RequestError, match="requirements-distributed.txt"):
        list(embed_by_dask(RefSegSettings(), {}, "tcp://x:1"))
