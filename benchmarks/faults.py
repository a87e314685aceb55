"""Kill the server at random moments while clients work: is each acknowledged label still there?

    python benchmarks/faults.py --kills 50 --out build/faults

Two clients submit and delete labels, a third asks for masks and next images; a 5xx that does not
say when to come again is a finding. After each kill the server is started again. At the end each
label on the disk must be one that was acknowledged last or was under way when the server died, the
names stored with it must be that label's own, every older acknowledged version must be in the
history, and the bank must hold what a bank made anew from the same folder holds. Exit code 1
otherwise.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import requests
from PIL import Image

from benchmarks.bank_check import differences
from benchmarks.fuzz_server import FuzzServer
from lib.durable import digest_of

IMAGES = [f"image {number}" for number in range(6)]
SIZE = (24, 20)
NOTHING = "nothing"  # the digest of a label that was deleted
DELETED = 0.15  # of a client's acts


class Client(threading.Thread):
    """Submits and deletes labels of its own images, and remembers what was answered."""

    def __init__(self, server: FuzzServer, folder: Path, images: list[str], seed: int) -> None:
        super().__init__(daemon=True)
        self.acknowledged: dict[str, list[str]] = {image: [] for image in images}
        self.under_way: dict[str, set[str]] = {image: set() for image in images}
        self.faults: list[str] = []
        self.ended = False
        self._server = server
        self._folder = folder
        self._rng = np.random.default_rng(seed)
        self._number = seed * 1_000_000

    def run(self) -> None:
        """Submit and delete until told to end."""
        while not self.ended:
            for image, done in self.acknowledged.items():
                try:
                    if done and done[-1] != NOTHING and self._rng.random() < DELETED:
                        self._remove(image)
                    else:
                        self._submit(image)
                except requests.RequestException:
                    time.sleep(0.2)  # it is dead, or being started

    def _submit(self, image: str) -> None:
        self._number += 1
        file = self._folder / f"label {self._number}.png"
        values = (self._rng.random(SIZE) < 0.4).astype(np.uint8)
        Image.fromarray(values).save(file)
        digest = digest_of(file)
        params = {"label_info": [{"name": digest[:12], "idx": 1}]}
        self.under_way[image].add(digest)
        with file.open("rb") as opened:
            answer = requests.put(
                f"{self._server.url}/datastore/label",
                params={"image": image},
                data={"params": json.dumps(params)},
                files={"label": ("label.png", opened)},
                timeout=300,
            )
        self._note(image, digest, answer)

    def _remove(self, image: str) -> None:
        self.under_way[image].add(NOTHING)
        query = {"id": image, "tag": "final"}
        url = f"{self._server.url}/datastore/label"
        self._note(image, NOTHING, requests.delete(url, params=query, timeout=300))

    def _note(self, image: str, digest: str, answer: requests.Response) -> None:
        self.faults += fault(answer)
        if answer.ok:
            self.acknowledged[image].append(digest)
            self.under_way[image].clear()


class Asker(threading.Thread):
    """Asks for masks and for the next image meanwhile."""

    def __init__(self, server: FuzzServer) -> None:
        super().__init__(daemon=True)
        self.answered = 0
        self.faults: list[str] = []
        self.ended = False
        self._server = server

    def run(self) -> None:
        """Ask until told to end."""
        while not self.ended:
            for image in IMAGES:
                try:
                    self._ask(f"infer/refseg?image={image}&output=json")
                    self._ask("activelearning/refseg")
                except requests.RequestException:
                    time.sleep(0.2)

    def _ask(self, what: str) -> None:
        answer = requests.post(f"{self._server.url}/{what}", timeout=300)
        self.faults += fault(answer)
        self.answered += answer.ok


def fault(answer: requests.Response) -> list[str]:
    """What is wrong with an answer."""
    later = answer.status_code == 503 and "Retry-After" in answer.headers
    bad = answer.status_code >= 500 and not later
    return [f"{answer.status_code} {answer.url}: {answer.text[:200]}"] if bad else []


def main() -> int:
    """Run, and tell what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds between two kills")
    parser.add_argument("--out", type=Path, default=Path("build/faults"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    studies = arguments.out / "server" / "studies"
    studies.mkdir(parents=True)
    rng = random.Random(arguments.seed)
    for number, name in enumerate(IMAGES):
        noise = np.random.default_rng(number).integers(0, 255, SIZE, np.uint8)
        Image.fromarray(noise).save(studies / f"{name}.png")
    with FuzzServer(arguments.out / "server", conf={"history": "1000"}) as server:
        halves = (IMAGES[:3], IMAGES[3:])
        clients = [Client(server, arguments.out, images, n) for n, images in enumerate(halves, 1)]
        asker = Asker(server)
        workers = [*clients, asker]
        for worker in workers:
            worker.start()
        for _ in range(arguments.kills):
            time.sleep(rng.uniform(0.2, arguments.longest))
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            server.alive()  # starts it again
        for worker in workers:
            worker.ended = True
        for worker in workers:
            worker.join()
        query = {"image": "seed0", "output": "json"}
        requests.post(f"{server.url}/infer/refseg", params=query, timeout=300).raise_for_status()
    bank = arguments.out / "server" / "bank"
    found = _lost(studies, clients) + differences(studies, bank, arguments.out / "bank anew")
    found += [line for worker in workers for line in worker.faults]
    count = sum(len(done) for client in clients for done in client.acknowledged.values())
    print(
        f"{arguments.kills} kills, {count} submits and deletes acknowledged, "
        f"{asker.answered} masks and next images, {len(found)} findings"
    )
    for line in found:
        print(line)
    return int(bool(found))


def _lost(studies: Path, clients: list[Client]) -> list[str]:
    """Acknowledged labels that are not where they should be."""
    found = []
    table = json.loads((studies / "datastore_v2.json").read_bytes())["objects"]
    for client in clients:
        for image, done in client.acknowledged.items():
            file = studies / "labels/final" / f"{image}.png"
            now = digest_of(file) if file.exists() else NOTHING
            if done and now != done[-1] and now not in client.under_way[image]:
                found.append(f"{image}: {now[:12]} is the label, {done[-1][:12]} was acknowledged")
            info: Any = table[image]["labels"].get("final", {}).get("info", {})
            names = [entry["name"] for entry in info.get("label_info", [])]
            if done and names != ([now[:12]] if now != NOTHING else []):
                found.append(f"{image}: the label {now[:12]} has the names {names}")
            kept = studies / "labels/.history/final" / image
            older = {digest_of(path) for path in kept.glob("0*.png")} | {now}
            found += [
                f"{image}: version {d[:12]} is gone" for d in done if d not in older | {NOTHING}
            ]
    return found


if __name__ == "__main__":
    sys.exit(main())
