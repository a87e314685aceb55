"""Leases between processes, with a clock that the test turns."""

import subprocess
import sys
from pathlib import Path

import pytest

from lib.memory.leases import Leases

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(tmp_path: Path, clock: Clock) -> Leases:
    return Leases(tmp_path, clock=clock)


def test_a_lease_keeps_others_away_until_it_ends(leases: Leases, clock: Clock) -> None:
    assert leases.take("scan", "one", 60)
    assert not leases.take("scan", "two", 60)
    clock.now += 59
    assert leases.take("scan", "one", 60)  # begins anew
    clock.now += 59
    assert not leases.take("scan", "two", 60)
    assert leases.active()["scan"].client_id == "one"
    clock.now += 2
    assert leases.active() == {}
    assert leases.take("scan", "two", 60)


def test_a_clock_that_is_set_back_ends_what_it_gave_ahead(leases: Leases, clock: Clock) -> None:
    clock.now += 86400
    leases.take("scan", "one", 600)
    clock.now -= 2
    assert "scan" in leases.active(), "clocks of machines differ by so much"
    clock.now -= 86400
    assert leases.active() == {}
    assert leases.take("scan", "two", 600)


def test_a_skipped_image_is_free_for_others(leases: Leases) -> None:
    leases.take("scan", "one", 60)
    leases.skip(["scan"], "one")
    assert leases.skipped("one") == {"scan": 1000.0}
    assert leases.skipped("two") == {}
    assert leases.take("scan", "two", 60)
    leases.release(["scan"])
    assert leases.skipped("one") == {}
    assert leases.active() == {}


def test_a_skip_does_not_end_another_clients_lease(leases: Leases) -> None:
    leases.take("scan", "one", 60)
    leases.skip(["scan"], "two")
    assert leases.active()["scan"].client_id == "one"


def test_what_was_asked_for_is_remembered(leases: Leases) -> None:
    leases.offer("scan", {"liver", "tumor"})
    assert leases.looked_for() == {}
    leases.saved("scan")
    assert leases.looked_for() == {"scan": frozenset({"liver", "tumor"})}


def test_of_processes_that_race_for_an_image_one_gets_it(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from lib.memory.leases import Leases
leases = Leases(Path(sys.argv[1]))
sys.stdin.readline()
print(",".join(str(n) for n in range(40) if leases.take(f"scan {n}", sys.argv[2], 600)))
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    got = [set(answer.split(",")) - {""} for answer in answers]
    assert not got[0] & got[1]
    assert len(got[0] | got[1]) == 40
