"""Clients that annotate: next sample, segmentation, submit, delete, read, train."""

import hashlib
import json
import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests

from benchmarks.load_images import NAMES, Case
from benchmarks.load_ledger import NOTHING, Ledger

PATIENCE_S = 300.0
LONGEST_PAUSE_S = 10.0  # however long a busy server asks its clients to stay away
ACTIONS = {"infer": 40, "next": 14, "submit": 22, "delete": 11, "read": 10, "list": 3}
USUAL = {  # answers that are no success, and no fault either: another client was quicker
    "delete": {404},
    "read": {404},
    "train": {429},
}
TRAINING = {
    "max_epochs": 1, "steps_per_epoch": 2, "images": 3, "size": 64, "val_split": 0.05,
    "multi_gpu": False, "unlabelled_images": False,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        endpoint: what was asked for.
        at: when it was sent, s since the traffic began.
        seconds: until the answer was there.
        status: of the answer; 0: there was none.
        retry: whether the answer said when to come again.
        busy: whether a segmentation was under way when it was sent.
    """

    endpoint: str
    at: float
    seconds: float
    status: int
    retry: bool
    busy: bool


@dataclass
class Traffic:
    """What all clients of one run share.

    Attributes:
        url: of the server.
        cases: the images.
        ledger: what was written.
        models: that can be asked for a segmentation.
        samples: of all requests.
        findings: sentences on answers that were wrong.
        dice: of the ball, of each segmented picture.
        flying: segmentations that are under way.
        over: set to end the clients.
    """

    url: str
    cases: dict[str, Case]
    ledger: Ledger = field(default_factory=Ledger)
    models: list[str] = field(default_factory=lambda: ["refseg"])
    samples: list[Sample] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    dice: list[float] = field(default_factory=list)
    flying: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(
        self, session: requests.Session, endpoint: str, method: str, path: str, **more: Any
    ) -> requests.Response | None:
        """Send a request and note how it was answered; None if it was not."""
        infer, status, retry = endpoint == "infer", 0, ""
        with self._lock:
            busy = self.flying > 0
            self.flying += infer
        start = time.monotonic()
        try:
            answer = session.request(method, self.url + path, timeout=PATIENCE_S, **more)
            status, retry = answer.status_code, answer.headers.get("Retry-After", "")
        except requests.RequestException as error:
            self.findings.append(f"{endpoint}: {type(error).__name__}: {error}")
            return None
        finally:
            seconds = time.monotonic() - start
            at = start - self.began
            self.samples.append(Sample(endpoint, at, seconds, status, bool(retry), busy))
            with self._lock:
                self.flying -= infer
        if status == 503 and retry:
            self.over.wait(min(float(retry), LONGEST_PAUSE_S))
        elif status >= 400 and status not in USUAL.get(endpoint, ()):
            self.findings.append(f"{endpoint}: {status} {answer.text[:300]}")
        return answer

    def submit(self, session: requests.Session, image: str, grow: float, mark: str) -> None:
        """Submit a label that no other is like."""
        case = self.cases[image]
        data = case.label(mark, grow)
        digest = hashlib.sha256(data).hexdigest()
        params = {"label_info": NAMES, "mark": digest}
        write = self.ledger.begin(image, digest, time.monotonic())
        files = {"label": (f"label{case.ending}", data), "params": (None, json.dumps(params))}
        put = self.send(
            session, "submit", "PUT", "/datastore/label", params={"image": image}, files=files
        )
        self.ledger.end(image, write, time.monotonic(), done=_was_done(put))


class Client(threading.Thread):
    """One annotator, who does the same as in any other run of this seed."""

    def __init__(self, traffic: Traffic, number: int, *, seed: int, think: float) -> None:
        super().__init__(daemon=True, name=f"client {number}")
        self._traffic = traffic
        self._random = random.Random(f"{seed} {number}")
        self._think = think
        self._session = requests.Session()
        self._mine = ""  # the image that `next` gave
        self._number = 0

    def run(self) -> None:
        """Until the traffic is over."""
        while not self._traffic.over.wait(self._random.expovariate(1 / self._think)):
            (action,) = self._random.choices(list(ACTIONS), list(ACTIONS.values()))
            try:
                getattr(self, f"_{action}")()
            except Exception as error:  # noqa: BLE001
                self._traffic.findings.append(f"{action}: the answer was no good: {error!r}")

    def _any(self, among: Sequence[str] = ()) -> str:
        return self._random.choice(among or list(self._traffic.cases))

    def _infer(self) -> None:
        image = self._mine if self._mine and self._random.random() < 0.5 else self._any()
        model = self._any(self._traffic.models)
        case = self._traffic.cases[image]
        params = {"client_id": self.name, "result_extension": case.ending}
        answer = self._traffic.send(
            self._session,
            "infer",
            "POST",
            f"/infer/{model}",
            params={"image": image, "output": "image"},
            files={"params": (None, json.dumps(params))},
        )
        if answer is None or not answer.ok:
            return
        mask = case.mask(answer.content)
        if mask.shape != case.shape:
            self._traffic.findings.append(f"{image}: a mask of {mask.shape}, not {case.shape}")
        elif len(case.shape) == 2:
            ball, found = case.truth() == 1, mask == 1
            both = float(np.sum(ball & found))
            self._traffic.dice.append(2 * both / max(1.0, float(ball.sum() + found.sum())))

    def _next(self) -> None:
        body = {"client_id": self.name}
        answer = self._traffic.send(
            self._session, "next", "POST", "/activelearning/refseg", json=body
        )
        if answer is not None and answer.ok:
            self._mine = answer.json().get("id", "")
            if self._mine and self._mine not in self._traffic.cases:
                self._traffic.findings.append(f"next: {self._mine!r} is no image of the studies")

    def _submit(self) -> None:
        image = self._mine if self._mine and self._random.random() < 0.6 else self._any()
        self._number += 1
        grow, mark = self._random.uniform(-1.5, 1.5), f"{self.name} {self._number}"
        self._traffic.submit(self._session, image, grow, mark)
        if image == self._mine:
            self._mine = ""

    def _delete(self) -> None:
        image = self._any(self._traffic.ledger.labelled())
        query = {"id": image, "tag": "final"}
        write = self._traffic.ledger.begin(image, NOTHING, time.monotonic())
        answer = self._traffic.send(
            self._session, "delete", "DELETE", "/datastore/label", params=query
        )
        self._traffic.ledger.end(image, write, time.monotonic(), done=_was_done(answer))

    def _read(self) -> None:
        image = self._any(self._traffic.ledger.labelled())
        start = time.monotonic()
        query = {"label": image, "tag": "final"}
        answer = self._traffic.send(self._session, "read", "GET", "/datastore/label", params=query)
        if answer is None or not (answer.ok or answer.status_code == 404):
            return
        seen = hashlib.sha256(answer.content).hexdigest() if answer.ok else NOTHING
        allowed = self._traffic.ledger.possible(image, start, time.monotonic())
        if seen not in allowed:
            text = f"{image}: {seen[:12] or 'nothing'} was read, {short(allowed)} is its label"
            self._traffic.findings.append(text)

    def _list(self) -> None:
        answer = self._traffic.send(self._session, "list", "GET", "/datastore/?output=all")
        if answer is not None and answer.ok:
            objects = answer.json()["objects"]
            if len(objects) != len(self._traffic.cases):
                self._traffic.findings.append(f"list: {len(objects)} images are in the datastore")


class Watcher(threading.Thread):
    """Asks `/info/` all the time, and starts a training now and then."""

    def __init__(self, traffic: Traffic, *, pause: float, train_every: float) -> None:
        super().__init__(daemon=True, name="watcher")
        self._traffic = traffic
        self._pause = pause
        self._train_every = train_every

    def run(self) -> None:
        """Until the traffic is over."""
        session, due = requests.Session(), time.monotonic() + self._train_every / 2
        while not self._traffic.over.wait(self._pause):
            answer = self._traffic.send(session, "info", "GET", "/info/")
            if answer is not None and answer.ok:
                self._traffic.models = sorted(answer.json()["models"])
            if time.monotonic() > due:
                due = time.monotonic() + self._train_every
                path = "/train/matchseg"
                self._traffic.send(session, "train", "POST", path, json=TRAINING)


def short(digests: set[str]) -> str:
    """Digests for people."""
    return " or ".join(sorted(digest[:12] or "nothing" for digest in digests))


def _was_done(answer: requests.Response | None) -> bool | None:
    """Whether a write was done; None if nobody knows."""
    if answer is not None and answer.ok:
        return True
    refused = answer is not None and (answer.status_code < 500 or answer.status_code in (503, 507))
    return False if refused else None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
