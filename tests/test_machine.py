"""Processes that know each other: who is there, and one that ends with another."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lib.machine import identity, is_alive

ROOT = Path(__file__).resolve().parents[1]
SLEEPS = "import time; time.sleep(600)"
ENDS_WITH = "import sys, time; from lib.machine import end_with; end_with(sys.argv[1]); "


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_process_is_known_by_more_than_its_number() -> None:
    assert is_alive(identity())
    number, _, since = identity().partition(":")
    assert not is_alive(f"{number}:{float(since) - 3600:.0f}")  # another one, an hour ago
    assert not is_alive("nobody")
    assert not is_alive("")


def test_who_it_is_does_not_change_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1.0)
    assert identity() == before


def test_a_process_ends_with_another_also_if_that_is_gone_already() -> None:
    tells = "from lib.machine import identity; print(identity(), flush=True); " + SLEEPS
    with started(tells) as first:
        assert first.stdout is not None
        who = first.stdout.readline().strip()
        assert is_alive(who)
        with started(ENDS_WITH + SLEEPS, who) as second:
            try:
                second.wait(3)
                raise AssertionError("it ended while the other one was there")
            except subprocess.TimeoutExpired:
                pass
            first.kill()
            assert second.wait(30) == 1
    assert not is_alive(who)
    with started(ENDS_WITH + SLEEPS, who) as late:
        assert late.wait(30) == 1
