"""Bad files and bad requests against a real server: no 5xx, no hang, bounded memory, still alive.

    python benchmarks/fuzz.py --requests 20000 --out build/fuzz

Each request is made from (seed, number) alone, so a run that was interrupted goes on where it was
(`--out` remembers how far it came), and a finding is repeated with `--only NUMBER`. Exit code 1
if there is a finding. The server is `main.py serve`, in a process of its own.
"""

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import requests

from benchmarks.fuzz_files import FILES
from benchmarks.fuzz_requests import Wish, make_wish
from benchmarks.fuzz_server import FuzzServer

HANG_S = 120.0
MOST_MB = 3000  # of memory at any look
EVERY = 50  # requests between two looks at the memory and two notes of how far it is


def main() -> int:
    """Run, and tell what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--only", type=int, help="repeat one request, and show it")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long (0: never)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    state = _State(arguments.out / f"seed{arguments.seed}.json")
    numbers = range(state.done, arguments.requests)
    if arguments.only is not None:
        numbers = range(arguments.only, arguments.only + 1)
    end = time.monotonic() + 60 * (arguments.minutes or 10**6)
    with FuzzServer(arguments.out / "server") as server:
        first = server.rss()
        for number in numbers:
            if time.monotonic() > end:
                break
            wish = make_wish(np.random.default_rng([arguments.seed, number]))
            finding = _try(server, wish, state)
            if arguments.only is not None:
                print(wish.shown(), finding or "no finding")
                return int(bool(finding))
            if finding:
                state.findings.append({"number": number, "wish": wish.shown(), "found": finding})
                print(f"{number}: {finding}: {wish.shown()}", flush=True)
            state.done = number + 1
            if state.done % EVERY == 0:
                state.memory.append([state.done, server.rss()])
                state.write()
        state.memory.append([state.done, server.rss()])
    state.write()
    peak = max(row[1] for row in state.memory)
    print(f"{state.done} requests, {len(FILES)} kinds of files; {len(state.findings)} findings")
    print("  ".join(f"{status}: {count}" for status, count in sorted(state.statuses.items())))
    print(f"memory: {first / 2**20:.0f} MB at the start, {peak / 2**20:.0f} MB at most")
    print(f"slowest: {state.slowest:.1f} s")
    return int(bool(state.findings) or peak > MOST_MB * 2**20)


class _State:
    """What is remembered between runs."""

    def __init__(self, path: Path) -> None:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._path = path
        self.done: int = found.get("done", 0)
        self.findings: list[Any] = found.get("findings", [])
        self.memory: list[list[int]] = found.get("memory", [])
        self.slowest: float = found.get("slowest", 0.0)
        self.statuses: collections.Counter[str] = collections.Counter(found.get("statuses", {}))

    def write(self) -> None:
        told = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(told, indent=1))
        beside.replace(self._path)


def _try(server: FuzzServer, wish: Wish, state: _State) -> str:
    """Send one request; what is wrong with the answer, or nothing."""
    start = time.monotonic()
    try:
        status, text = wish.send(server.url, HANG_S)
    except requests.Timeout:
        return f"no answer in {HANG_S:.0f} s"
    except (requests.RequestException, OSError) as error:
        if not server.alive():
            return f"the server died: {server.log()[-400:]}"
        status, text = 0, type(error).__name__  # a broken request may end the connection
    state.slowest = max(state.slowest, time.monotonic() - start)
    state.statuses[str(status)] += 1
    if not status and "files" in wish.more:  # whole requests, whatever the files hold
        return f"no answer: {text}"
    if status >= 500:
        return f"{status} {text[:300]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
