"""Embeddings of a large pool ahead of time, by many processes or machines; one of them writes."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lib.errors import RefSegError, RequestError
from lib.memory.pool import LAYOUT
from lib.runtime import Runtime
from lib.settings import RefSegSettings, from_conf
from lib.types import HalfArray

logger = logging.getLogger(__name__)

AT_ONCE = 256  # images handed out and not yet back: what the queue holds is bounded
RESTARTS = 3  # of a worker that dies without an image, before it is given up
DASK_LOOK_S = 20.0  # without any answer, after which it is asked whether workers are left
KEPT = "what is done is kept."
WORKERS_DIED = "the workers that read it died"
KILLER = "the process that read it died, alone as among others; it may be too large for the memory"
NEEDS_DASK = (
    "--address needs Dask, which is not installed: pip install -r requirements-distributed.txt, "
    "here and on every machine. Or leave --address out and give --workers."
)


@dataclass(frozen=True, eq=False)
class Embedded:
    """One image's embeddings, or why there are none.

    Attributes:
        image_id: which.
        vectors: (n, C) rows, see `Runtime.embed_file`; None where the image cannot be read.
        numbers: of each row its slice's.
        error: a sentence; "" where all is well.
    """

    image_id: str
    vectors: HalfArray | None
    numbers: tuple[int, ...]
    error: str = ""


Conf = tuple[tuple[str, str], ...]
_runtimes: dict[Conf, Runtime] = {}  # of a worker process


def embed_one(conf: Conf, image_id: str, path: str) -> Embedded:
    """Embed one image in a worker; networks are loaded by the first call of its process."""
    return _embed(_runtime(conf), image_id, Path(path))


def warm_up(conf: Conf) -> None:
    """Load the networks of a worker and run them once: what it can do without any image."""
    _runtime(conf).warm_up()


def fingerprint_of(conf: Conf) -> str:
    """The fingerprint that a worker would embed under: it must be the same everywhere."""
    return f"{_runtime(conf).fingerprint} {LAYOUT}"


def embed_here(runtime: Runtime, paths: Mapping[str, Path]) -> Iterator[Embedded]:
    """One after the other, in this process."""
    for image_id, path in paths.items():
        yield _embed(runtime, image_id, path)


def embed_in_processes(
    settings: RefSegSettings, paths: Mapping[str, Path], workers: int
) -> Iterator[Embedded]:
    """By processes of this machine. A worker that dies is replaced.

    Images are begun in their order, so that one of the first that are not back did it, if any did:
    these are done again, each alone, and one that kills its worker then, too, is told as failed.

    Raises:
        RequestError: workers die without any image.
    """
    conf = as_conf(settings)
    left = dict(paths)
    while left:
        try:
            with _processes(workers) as pool:
                for found in _in_flight(
                    left, lambda image_id, path: pool.submit(embed_one, conf, image_id, path)
                ):
                    left.pop(found.image_id, None)
                    yield found
        except BrokenProcessPool:
            logger.warning("a worker died; %d images are left, some are done alone", len(left))
            for found in _one_by_one(conf, dict(islice(left.items(), 2 * workers))):
                left.pop(found.image_id, None)
                yield found


def _one_by_one(conf: Conf, paths: Mapping[str, Path]) -> Iterator[Embedded]:
    """Each alone in a process, so that it is known which one kills it."""
    pool: ProcessPoolExecutor | None = None
    try:
        for image_id, path in paths.items():
            pool = pool or _sound_process(conf)
            try:
                found = pool.submit(embed_one, conf, image_id, str(path)).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = None
                found = Embedded(image_id, None, (), KILLER)
            yield found
    finally:
        if pool is not None:
            pool.shutdown()


def _sound_process(conf: Conf) -> ProcessPoolExecutor:
    """One process that has run the networks: what kills it from now on is the image."""
    for _ in range(RESTARTS + 1):
        pool = _processes(1)
        try:
            pool.submit(warm_up, conf).result()
        except BrokenProcessPool:
            pool.shutdown()
        else:
            return pool
    msg = f"Workers died {RESTARTS + 1} times before they were given any image, perhaps for want of"
    msg += f" memory. Free some, or leave --workers out; {KEPT}"
    raise RequestError(msg)


def _processes(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_share_cores,
        initargs=(max(1, (os.cpu_count() or 1) // workers),),
    )


def embed_by_dask(
    settings: RefSegSettings, paths: Mapping[str, Path], address: str
) -> Iterator[Embedded]:
    """By the workers of a Dask scheduler, on any machines that see the studies at the same paths.

    Dask gives the images of a worker that dies to the others, until so many have died of one as it
    allows; then that is told as failed. Each worker needs this repository on its path and the same
    weights; its fingerprint is compared with ours first.

    Raises:
        RequestError: Dask is not installed, nobody answers, or the workers have other weights.
    """
    require_dask()
    from distributed import Client

    conf = as_conf(settings)
    with ExitStack() as stack:
        try:
            client: Any = stack.enter_context(Client(address, timeout="20s"))
        except (OSError, TimeoutError, ValueError) as error:
            msg = f"No Dask scheduler answers at {address}: {error}. Start one: dask scheduler."
            raise RequestError(msg) from error
        _compare_networks(client, conf, address)
        killed: dict[str, Embedded] = {}
        for found in _ask_workers(client, address, conf, paths, AT_ONCE):
            if found.error.startswith(WORKERS_DIED):
                killed[found.image_id] = found
            else:
                yield found
        if len(killed) < 2:
            yield from killed.values()
        else:  # Dask suspects what only waited at a worker that died, too
            again = {image_id: paths[image_id] for image_id in killed}
            yield from _ask_workers(client, address, conf, again, 1)


def _ask_workers(
    client: Any, address: str, conf: Conf, paths: Mapping[str, Path], at_once: int
) -> Iterator[Embedded]:
    """Hand images to the workers of Dask, so many at once."""
    from distributed import CancelledError, wait
    from distributed import TimeoutError as DaskTimeoutError  # not the built-in one on Python 3.10

    waiting = iter(paths.items())
    running: dict[Any, str] = {}
    while True:
        for image_id, path in islice(waiting, at_once - len(running)):
            work = (embed_one, conf, image_id, str(path))
            running[client.submit(*work, pure=False, retries=RESTARTS)] = image_id
        if not running:
            return
        try:
            done = wait(list(running), DASK_LOOK_S, return_when="FIRST_COMPLETED").done
        except DaskTimeoutError:
            if not client.scheduler_info()["workers"]:
                msg = f"No worker is left at {address}; start some and `embed` again: {KEPT}"
                raise RequestError(msg) from None
            continue
        except CancelledError as error:
            msg = f"The scheduler at {address} is gone; start it and `embed` again: {KEPT}"
            raise RequestError(msg) from error
        for future in done:
            yield _answer_of(future, running.pop(future))


def _compare_networks(client: Any, conf: Conf, address: str) -> None:
    from distributed import TimeoutError as DaskTimeoutError

    ours = fingerprint_of(conf)
    try:
        client.wait_for_workers(1, timeout=60)
        theirs = client.run(fingerprint_of, conf)
    except DaskTimeoutError as error:
        msg = f"No worker is at {address}. Start some: PYTHONPATH=. dask worker {address}."
        raise RequestError(msg) from error
    except Exception as error:  # of a worker, whatever it met
        msg = f"The workers at {address} cannot load the networks: {type(error).__name__}: {error}."
        msg += " Start them in this repository, with PYTHONPATH=. and the same weights."
        raise RequestError(msg) from error
    other = sorted(worker for worker, mark in theirs.items() if mark != ours)
    if other:
        msg = f"Workers {', '.join(other)} have other networks ({theirs[other[0]]}, not {ours})"
        msg += "; give all machines the same weights and options."
        raise RequestError(msg)


def _answer_of(future: Any, image_id: str) -> Embedded:
    """What a worker of Dask made of an image, or what it was that kept it from it."""
    error = future.exception()
    if error is None:
        return future.result()  # type: ignore[no-any-return]
    reason = f"{type(error).__name__}: {error}"
    if type(error).__name__ == "KilledWorker":
        reason = f"{WORKERS_DIED}, {error.allowed_failures + 1} of them; {reason}"
    return Embedded(image_id, None, (), reason)


def require_dask() -> None:
    """Find out before anything is loaded.

    Raises:
        RequestError: Dask is not installed.
    """
    if find_spec("distributed") is None:
        raise RequestError(NEEDS_DASK)


def as_conf(settings: RefSegSettings) -> Conf:
    """What a worker must know of the settings, as text: all that was set."""
    rows = []
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        if value is None or value == () or name == "bank":
            continue
        text = ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
        rows.append((name, text))
    return tuple(rows)


def _runtime(conf: Conf) -> Runtime:
    if conf not in _runtimes:
        _runtimes[conf] = Runtime(from_conf(dict(conf)), bank_root=Path.cwd(), studies="worker")
    return _runtimes[conf]


def _embed(runtime: Runtime, image_id: str, path: Path) -> Embedded:
    try:
        vectors, numbers = runtime.embed_file(path)
    except (RefSegError, OSError) as error:
        return Embedded(image_id, None, (), str(error))
    except Exception as error:  # too large for the memory, or a decoder's own: one image of many
        logger.exception("an image cannot be embedded")
        return Embedded(image_id, None, (), f"{type(error).__name__}: {error}")
    return Embedded(image_id, vectors, tuple(numbers))


def _in_flight(
    paths: Mapping[str, Path], submit: Callable[[str, str], "Future[Embedded]"]
) -> Iterator[Embedded]:
    """Hand out a bounded number at a time."""
    waiting = iter(list(paths.items()))
    running: set[Future[Embedded]] = set()
    while True:
        while len(running) < AT_ONCE and (following := next(waiting, None)) is not None:
            running.add(submit(following[0], str(following[1])))
        if not running:
            return
        done = next(as_completed(running))
        running.discard(done)
        yield done.result()


def _share_cores(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
