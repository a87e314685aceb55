"""Logs: MONAI Label's own lines, or JSON without the names of images, which may be patients'."""

import hashlib
import json
import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from apps.refseg.server.answers import request_id

SHORTEST = 3  # characters of a name to be looked for: shorter ones would be found in any word
QUIET = ("monailabel", "watchdog")  # their INFO lines quote whole requests
ORDINARY = frozenset({"labels"})  # a folder beside the images, and a word of many lines
KEPT_NAMES = 100_000  # of images that are gone: lines about them come after they went
ENDING = r"\.(?:nii\.gz|nii|nrrd|mha|mhd|dcm|png|jpe?g|tiff?|bmp|svs|xml)"
FILE = re.compile(rf"[^'\"/\\:=(\n]+{ENDING}\b", re.I)
FILE_END = re.compile(rf"{ENDING}$", re.I)
LARGEST_FILE = 10 << 20
KEPT_FILES = 10
_KEY = secrets.token_bytes(16)  # without it, a mark could be found by trying names

Names = Callable[[], Iterable[str]]


class Pseudonyms:
    """Replaces names of images by marks, the same until the server ends, that tell nothing.

    A name that was known once stays known: what is told of an image that was deleted names it, too.
    """

    def __init__(self, names: Names, folders: Iterable[str]) -> None:
        """Nothing is asked for yet.

        Args:
            names: ids of all images; asked for at each line, so it must be quick and take no lock.
            folders: folders whose files' names are to be hidden: those of the studies.
        """
        self._names = names
        self._folders = [folder for folder in folders if len(folder) > 1]
        self._starts: dict[str, list[str]] = {}
        self._seen: list[str] = []
        self._known: dict[str, None] = {}  # the names, those that went first in front
        self._learning = threading.Lock()  # console and file have a lock each, not one together

    def hide(self, text: str) -> str:
        """The text without names of images, of files, or of what lies in the studies folder."""
        text = self._hide_known(text)
        for folder in self._folders:
            if folder in text:
                hidden = re.escape(folder) + r"[^\n'\"]*?(?=['\"\n]|:\s|,\s|$)"
                text = re.sub(hidden, lambda found: f"studies:{_mark(found.group())}", text)
        return FILE.sub(lambda found: f"file:{_mark(found.group())}", text)

    def _hide_known(self, text: str) -> str:
        self._learn()
        if not self._starts:
            return text
        parts, at, last = [], 0, 0
        while at <= len(text) - SHORTEST:
            found = self._known_at(text, at)
            if found:
                parts += [text[last:at], f"image:{_mark(found)}"]
                at = last = at + len(found)
            else:
                at += 1
        return "".join([*parts, text[last:]])

    def _known_at(self, text: str, at: int) -> str:
        for name in self._starts.get(text[at : at + SHORTEST], ()):
            if text.startswith(name, at):
                return name
        return ""

    def _learn(self) -> None:
        with self._learning:
            try:
                names = list(self._names())
            except RuntimeError:  # changed while it was read: the names of before will do
                return
            if names == self._seen:
                return
            self._seen = names
            # while the server starts, they are names of files; lines tell ids
            ids = [FILE_END.sub("", name) for name in names]
            told = (name for name in [*names, *ids] if len(name) >= SHORTEST)
            now = {name: None for name in told if name not in ORDINARY}
            gone = [name for name in self._known if name not in now][-KEPT_NAMES:]
            known = dict.fromkeys(gone) | now
            if known.keys() != self._known.keys():
                self._starts = _by_start(known)
            self._known = known


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the request's id."""

    def __init__(self, pseudonyms: Pseudonyms) -> None:
        super().__init__()
        self._pseudonyms = pseudonyms

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "thread": record.threadName,
            "message": self._pseudonyms.hide(record.getMessage()),
        }
        if request_id.get():
            line["request"] = request_id.get()
        if record.exc_info:
            line["error"] = self._pseudonyms.hide(self.formatException(record.exc_info))
        return json.dumps(line)


class WithRequest(logging.Filter):
    """Puts the request's id before each message of a text log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        mark = request_id.get()
        if mark and not getattr(record, "marked", False):
            record.msg, record.marked = f"[{mark}] {record.msg}", True
        return True


def log_config(kind: str, pseudonyms: Pseudonyms, folder: Path) -> dict[str, Any]:
    """Configuration for `logging.config.dictConfig`: console and `logs/app.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "[%(asctime)s] [%(threadName)s] [%(levelname)s] (%(name)s:%(lineno)d) - %(message)s"
    formatters: dict[str, Any] = {
        "line": {"()": JsonLines, "pseudonyms": pseudonyms} if kind == "json" else {"format": text}
    }
    console = {"class": "logging.StreamHandler", "formatter": "line", "filters": []}
    file = {
        "class": "logging.handlers.RotatingFileHandler",
        "formatter": "line",
        "filename": str(folder / "app.log"),
        "maxBytes": LARGEST_FILE,
        "backupCount": KEPT_FILES,
        "encoding": "utf-8",
        "filters": [],
    }
    if kind == "text":
        console["filters"] = file["filters"] = ["request"]
    quiet = {name: {"level": "WARNING"} for name in QUIET} if kind == "json" else {}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request": {"()": WithRequest}},
        "formatters": formatters,
        "handlers": {"console": console, "file": file},
        "root": {"level": "INFO", "handlers": ["console", "file"]},
        "loggers": {
            **quiet,
            "uvicorn.access": {"level": "WARNING"},  # it would log queries; ours logs routes
            "urllib3.connectionpool": {"level": "ERROR"},
            "httpx": {"level": "WARNING"},
        },
    }


def _by_start(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their first characters, the longest first: it may hold a shorter one."""
    starts: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        starts.setdefault(name[:SHORTEST], []).append(name)
    return starts


def _mark(name: str) -> str:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=_KEY, digest_size=5)
    return digest.hexdigest()
