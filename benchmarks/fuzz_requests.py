"""Requests: each of the server's routes with values that fit, nearly fit, or do not fit at all."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests

from benchmarks.fuzz_files import make_file

Generator = np.random.Generator

IDS = (
    [f"seed{n}" for n in range(2)]
    + [f"volume{n}" for n in range(2)]
    + [f"new {n}" for n in range(6)]
)
ODD = [
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "%2e%2e", "x\x00y", "x\r\ny",
    "\u202e", "é" * 140, "x" * 5000, "labels", "datastore_v2", ".lock", "None", "0", "-1",
    "1e999", "\U0001f600", "'; --", "<b>",
]  # fmt: skip
TAGS = ["final", "original", "mine"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**70, 1.5, 1e308, "", "x", "true", [], {}, [1, "a"], {"a":
    {"b": [1]}}, ["final"], [[[[]]]], "../x", "\x00", "é",
]  # fmt: skip
KEYS = [
    "k", "cap_per_case", "own_labels", "label_prompt", "result_extension", "result_dtype",
    "result_compress", "window", "axis", "client_id", "save_label", "label_tag", "device",
    "timeout", "image", "label", "session", "model", "restore_label_idx", "label_info",
    "strategy", "ts", "name", "path", "version", "params", "logging", "result_write_to_file",
    "max_epochs", "labels", "examine", "description",
]  # fmt: skip
RAW = [
    "",
    "{",
    "[]",
    "null",
    "1",
    "NaN",
    '{"k": NaN}',
    '{"a": "\\ud800"}',
    "[" * 3000,
    '{"a":' * 500,
    "\xff",
]


@dataclass
class Wish:
    """One request, to be sent to whichever server."""

    method: str
    path: str
    query: list[tuple[str, str]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def send(self, url: str, timeout: float) -> tuple[int, str]:
        """Status and the answer's text."""
        response = requests.request(
            self.method, url + self.path, params=self.query, timeout=timeout, **self.more
        )
        return response.status_code, response.text[:2000] if response.status_code >= 400 else ""

    def shown(self) -> str:
        """For people: long bytes cut off."""
        more = {key: repr(value)[:300] for key, value in self.more.items()}
        return f"{self.method} {self.path} {self.query!r:.400} {more}"


def make_wish(rng: Generator) -> Wish:
    """One request from a generator's state alone."""
    makers = list(MAKERS)
    weights = np.array([weight for _, weight in makers], float)
    return makers[int(rng.choice(len(makers), p=weights / weights.sum()))][0](rng)


def _pick(rng: Generator, values: list[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _id(rng: Generator) -> str:
    return str(_pick(rng, ODD if rng.random() < 0.2 else IDS))


def _tag(rng: Generator) -> str:
    return str(_pick(rng, ODD if rng.random() < 0.2 else TAGS))


def _value(rng: Generator) -> Any:
    return _pick(rng, ODD if rng.random() < 0.3 else VALUES)


def _object(rng: Generator) -> dict[str, Any]:
    return {str(_pick(rng, KEYS)): _value(rng) for _ in range(int(rng.integers(0, 4)))}


def _json(rng: Generator) -> str:
    if rng.random() < 0.15:
        return str(_pick(rng, RAW))
    found = _object(rng)
    if rng.random() < 0.5:
        names = [{"name": _value(rng), "idx": _value(rng)} for _ in range(int(rng.integers(0, 4)))]
        found["label_info"] = names if rng.random() < 0.8 else _value(rng)
    return json.dumps(found)


def _query(rng: Generator, **named: str) -> list[tuple[str, str]]:
    found = [(name, value) for name, value in named.items() if rng.random() > 0.05]
    if rng.random() < 0.1:
        found.append(
            (str(_pick(rng, ["output", "image", "tag", "x", "check_sum"])), str(_value(rng)))
        )
    return found


def _form(rng: Generator, field_name: str, text: str) -> dict[str, Any]:
    return (
        {"files": {field_name: (None, text)}}
        if rng.random() < 0.7
        else {"data": {field_name: text}}
    )


def _put_image(rng: Generator) -> Wish:
    files = {"file": make_file(rng), "params": (None, _json(rng))}
    return Wish("PUT", "/datastore/image", _query(rng, image=_id(rng)), {"files": files})


def _put_label(rng: Generator) -> Wish:
    files = {"label": make_file(rng), "params": (None, _json(rng))}
    query = _query(rng, image=_id(rng), tag=_tag(rng))
    return Wish("PUT", "/datastore/label", query, {"files": files})


def _infer(rng: Generator) -> Wish:
    output = str(_pick(rng, ["json", "image", "all", "dicom_seg", "x", ""]))
    query = _query(rng, image=_id(rng), **({"output": output} if output else {}))
    model = "refseg" if rng.random() < 0.9 else requests.utils.quote(_id(rng), safe="")
    more = _form(rng, "params", _json(rng))
    if rng.random() < 0.1:
        more = {"files": {"file": make_file(rng), "params": (None, _json(rng))}}
    return Wish("POST", f"/infer/{model}", query, more)


def _next(rng: Generator) -> Wish:
    name = str(_pick(rng, ["refseg", "random", "first", "coverage", "nobody", ".."]))
    body = (
        {"json": _object(rng)}
        if rng.random() < 0.8
        else {"data": str(_pick(rng, RAW)).encode("latin-1")}
    )
    return Wish("POST", f"/activelearning/{name}", [], body)


def _read(rng: Generator) -> Wish:
    path = str(_pick(rng, ["image", "label", "image/info", "label/info", "", "dataset"]))
    query = _query(rng, image=_id(rng), label=_id(rng), tag=_tag(rng))
    if rng.random() < 0.2:
        query.append(("limit_cases", str(_value(rng))))
    return Wish(str(_pick(rng, ["GET", "GET", "HEAD"])), f"/datastore/{path}", query)


def _delete(rng: Generator) -> Wish:
    if rng.random() < 0.7:
        return Wish("DELETE", "/datastore/label", _query(rng, id=_id(rng), tag=_tag(rng)))
    target = str(_pick(rng, ODD + [f"new {n}" for n in range(6)]))  # the first images stay
    return Wish("DELETE", "/datastore/image", [("id", target)])


def _info(rng: Generator) -> Wish:
    kind = str(_pick(rng, ["image", "label"]))
    query = _query(rng, image=_id(rng), label=_id(rng), tag=_tag(rng))
    return Wish("PUT", f"/datastore/{kind}/info", query, _form(rng, "info", _json(rng)))


def _session(rng: Generator) -> Wish:
    if rng.random() < 0.5:
        query = [
            ("uncompress", str(_pick(rng, ["true", "false", "x"]))),
            ("expiry", str(_value(rng))),
        ]
        return Wish("PUT", "/session/", query, {"files": [("files", make_file(rng))]})
    name = requests.utils.quote(_id(rng), safe="")
    return Wish(str(_pick(rng, ["GET", "DELETE"])), f"/session/{name}", [("image", "true")])


def _task(rng: Generator) -> Wish:
    path = str(
        _pick(rng, ["/train/", "/scoring/", "/batch/infer", "/info/", "/model/refseg", "/logs/"])
    )
    query = _query(rng, check_if_running="true", all=str(_value(rng)), lines=str(_value(rng)))
    return Wish("GET", path, query)


def _anything(rng: Generator) -> Wish:
    method = str(
        _pick(rng, ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"])
    )
    parts = [
        requests.utils.quote(str(_value(rng)), safe="") for _ in range(int(rng.integers(0, 5)))
    ]
    first = str(
        _pick(
            rng,
            ["infer", "datastore", "ohif", "static", "session", "model", "proxy", "x", "refseg"],
        )
    )
    more: dict[str, Any] = {"headers": {"X-Odd": "y" * int(rng.integers(0, 9000))}}
    if rng.random() < 0.4:
        kind = _pick(
            rng, ["multipart/form-data", "multipart/form-data; boundary=", "application/json", "x"]
        )
        more = {"headers": {"Content-Type": kind}, "data": rng.bytes(int(rng.integers(0, 500)))}
    return Wish(method, "/" + "/".join([first, *parts]), _query(rng, image=_id(rng)), more)


MAKERS: list[tuple[Callable[[Generator], Wish], float]] = [
    (_put_image, 4),
    (_put_label, 6),
    (_infer, 4),
    (_next, 2),
    (_read, 4),
    (_delete, 3),
    (_info, 3),
    (_session, 1),
    (_task, 1),
    (_anything, 3),
]
