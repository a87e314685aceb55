"""What a person waits for while the site's own model is trained beside the server.

    python benchmarks/while_training.py --data DIR --set glas

A real server serves a set whose bank cases are labelled; test images that it has not seen are
segmented one after another, first alone, then while epochs are trained, each image once. Told are
the seconds of a request, and the most memory that the server and the training were seen to hold.
"""

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import requests
import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from campaign import link

from benchmarks.fuzz_server import FuzzServer
from benchmarks.load_clients import percentile

PATIENCE_S = 300
GIB = 2**30


def main(
    data: Annotated[Path, typer.Option(help="Folder of local datastores with an index.json.")],
    name: Annotated[str, typer.Option("--set", help="Its name.")] = "glas",
    requests_each: Annotated[int, typer.Option("--requests", help="Of each kind.")] = 30,
    pause: Annotated[float, typer.Option(help="Of the annotator, s.")] = 2.0,
) -> None:
    """Measure; prints a Markdown table."""
    index = json.loads((data / "index.json").read_text(encoding="utf-8"))[name]
    with tempfile.TemporaryDirectory() as room:
        studies = Path(room) / "studies"
        link(data / name, studies)
        for case in index["targets"]:
            for label in (studies / "labels" / "final").glob(f"{case}.*"):
                label.unlink()
        with FuzzServer(Path(room), seeds=False) as server:
            rows = _rows(server, list(index["targets"]), requests_each, pause)
    print("| | requests | median, s | 95 %, s | slowest, s | server, GiB | training, GiB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(row)


def _rows(server: FuzzServer, images: Sequence[str], count: int, pause: float) -> list[str]:
    if len(images) < 2 * count + 1:
        msg = f"{len(images)} test images are there; {2 * count + 1} are needed: fewer --requests"
        raise typer.BadParameter(msg)
    _infer(server, images[0])  # the bank is filled, the network loaded
    own = psutil.Process(server.process.pid)
    with _Peaks(own) as peaks:
        alone = [_waited(server, image, pause) for image in images[1 : count + 1]]
    rows = [_row("nothing else runs", alone, peaks.found)]
    long = {"max_epochs": 1000, "minutes": 60, "early_stop_patience": 0}
    answer = requests.post(f"{server.url}/train/matchseg", json=long, timeout=60)
    answer.raise_for_status()
    training = None
    try:
        training = _training(server)
        with _Peaks(own, training) as peaks:
            beside = [_waited(server, image, pause) for image in images[count + 1 : 2 * count + 1]]
        if not training.is_running():
            msg = "the training ended before the requests did"
            raise RuntimeError(msg)
    finally:
        requests.delete(f"{server.url}/train/", timeout=60)
        if training is not None:
            psutil.wait_procs([training], timeout=PATIENCE_S)
    return [*rows, _row("a training beside it", beside, peaks.found)]


class _Peaks(threading.Thread):
    """The most memory that each process was seen to hold, looked at five times a second."""

    def __init__(self, *processes: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.found = [0] * len(processes)
        self._processes = processes
        self._over = threading.Event()

    def __enter__(self) -> "_Peaks":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.2):
            for place, process in enumerate(self._processes):
                with suppress(psutil.NoSuchProcess):
                    self.found[place] = max(self.found[place], process.memory_info().rss)


def _infer(server: FuzzServer, image: str) -> None:
    query = {"image": image, "output": "image"}
    found = requests.post(f"{server.url}/infer/refseg", params=query, timeout=PATIENCE_S)
    found.raise_for_status()


def _waited(server: FuzzServer, image: str, pause: float) -> float:
    time.sleep(pause)
    start = time.perf_counter()
    _infer(server, image)
    return time.perf_counter() - start


def _training(server: FuzzServer) -> psutil.Process:
    """The process that trains, as soon as it has begun its first epoch."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        stats = requests.get(f"{server.url}/info/", timeout=60).json()["train_stats"]["matchseg"]
        for child in psutil.Process(server.process.pid).children(recursive=True):
            if stats.get("total_epochs") and "train" in child.cmdline():
                return child
        time.sleep(0.5)
    msg = f"no training began: {server.log()[-3000:]}"
    raise RuntimeError(msg)


def _row(what: str, seconds: Sequence[float], peaks: Sequence[int]) -> str:
    times = [statistics.median(seconds), percentile(list(seconds), 0.95), max(seconds)]
    told = " | ".join(f"{value:.2f}" for value in times)
    memory = [f"{peak / GIB:.1f}" for peak in peaks]
    return f"| {what} | {len(seconds)} | {told} | {' | '.join([*memory, ''][:2])} |"


if __name__ == "__main__":
    typer.run(main)
