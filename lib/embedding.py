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
from lib.runtime import Runtime
from lib.settings import RefSegSettings, from_conf
from lib.types import FloatArray

logger = logging.getLogger(__name__)

AT_ONCE = 256  # images handed out and not yet back: what the queue holds is bounded
RESTARTS = 3  # of workers that died, before it is given up
NEEDS_DASK = (
    "--address needs Dask, which is not installed: pip install -r requirements-distributed.txt, "
    "here and on every machine. Or leave --address out and give --workers."
)


@dataclass(frozen=True, eq=False)
class Embedded:
    """One image's embeddings, or why there are none.

    Attributes:
        image_id: which.
        vectors: (n, E) unit float32; None where the image cannot be read.
        numbers: the slices' numbers.
        error: a sentence; "" where all is well.
    """

    image_id: str
    vectors: FloatArray | None
    numbers: tuple[int, ...]
    error: str = ""


_runtimes: dict[tuple[tuple[str, str], ...], Runtime] = {}  # of a worker process


def embed_one(conf: tuple[tuple[str, str], ...], image_id: str, path: str) -> Embedded:
    """Embed one image in a worker; networks are loaded by the first call of its process."""
    if conf not in _runtimes:
        settings = from_conf(dict(conf))
        _runtimes[conf] = Runtime(settings, bank_root=Path.cwd(), studies="worker")
    try:
        vectors, numbers = _runtimes[conf].embed_file(Path(path))
    except (RefSegError, OSError) as error:
        return Embedded(image_id, None, (), str(error))
    return Embedded(image_id, vectors, tuple(numbers))


def fingerprint_of(conf: tuple[tuple[str, str], ...]) -> str:
    """The fingerprint that a worker would embed under: it must be the same everywhere."""
    embed_settings = from_conf(dict(conf))
    return Runtime(embed_settings, bank_root=Path.cwd(), studies="worker").fingerprint


def embed_here(runtime: Runtime, paths: Mapping[str, Path]) -> Iterator[Embedded]:
    """One after the other, in this process."""
    for image_id, path in paths.items():
        try:
            vectors, numbers = runtime.embed_file(path)
        except (RefSegError, OSError) as error:
            yield Embedded(image_id, None, (), str(error))
        else:
            yield Embedded(image_id, vectors, tuple(numbers))


def embed_in_processes(
    settings: RefSegSettings, paths: Mapping[str, Path], workers: int
) -> Iterator[Embedded]:
    """By processes of this machine. A worker that dies is replaced, and its images done again.

    Raises:
        RequestError: workers died again and again.
    """
    conf = as_conf(settings)
    left = dict(paths)
    for attempt in range(RESTARTS + 1):
        try:
            with ProcessPoolExecutor(
                workers,
                mp_context=get_context("spawn"),
                initializer=_share_cores,
                initargs=(max(1, (os.cpu_count() or 1) // workers),),
            ) as pool:
                for found in _in_flight(
                    left, lambda image_id, path: pool.submit(embed_one, conf, image_id, path)
                ):
                    left.pop(found.image_id, None)
                    yield found
            return
        except BrokenProcessPool:
            logger.warning("a worker died; %d images are left", len(left))
            if attempt == RESTARTS:
                msg = f"Workers died {RESTARTS + 1} times, perhaps for want of memory"
                msg += f"; {len(left)} images are left. Try fewer --workers; what is done is kept."
                raise RequestError(msg) from None


def embed_by_dask(
    settings: RefSegSettings, paths: Mapping[str, Path], address: str
) -> Iterator[Embedded]:
    """By the workers of a Dask scheduler, on any machines that see the studies at the same paths.

    Dask gives the images of a worker that dies to the others. Each worker needs this repository
    on its path and the same weights; its fingerprint is compared with ours first.

    Raises:
        RequestError: Dask is not installed, nobody answers, or the workers have other weights.
    """
    require_dask()
    from distributed import Client
    from distributed import as_completed as completed

    conf = as_conf(settings)
    with ExitStack() as stack:
        try:
            client: Any = stack.enter_context(Client(address, timeout="20s"))
        except (OSError, TimeoutError, ValueError) as error:
            msg = f"No Dask scheduler answers at {address}: {error}. Start one: dask scheduler."
            raise RequestError(msg) from error
        client.wait_for_workers(1, timeout=60)
        ours = fingerprint_of(conf)
        theirs = client.run(fingerprint_of, conf)
        other = sorted(worker for worker, mark in theirs.items() if mark != ours)
        if other:
            msg = f"Workers {', '.join(other)} have other networks ({theirs[other[0]]}, not {ours})"
            msg += "; give all machines the same weights and options."
            raise RequestError(msg)
        waiting = iter(paths.items())

        def submit(image_id: str, path: Path) -> Any:
            return client.submit(embed_one, conf, image_id, str(path), pure=False, retries=RESTARTS)

        first = [submit(*item) for item in islice(waiting, AT_ONCE)]
        queue = completed(first, with_results=False)
        for future in queue:
            yield future.result()
            following = next(waiting, None)
            if following is not None:
                queue.add(submit(*following))


def require_dask() -> None:
    """Find out before anything is loaded.

    Raises:
        RequestError: Dask is not installed.
    """
    if find_spec("distributed") is None:
        raise RequestError(NEEDS_DASK)


def as_conf(settings: RefSegSettings) -> tuple[tuple[str, str], ...]:
    """What a worker must know of the settings, as text: all that was set."""
    rows = []
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        if value is None or value == () or name == "bank":
            continue
        text = ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
        rows.append((name, text))
    return tuple(rows)


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
