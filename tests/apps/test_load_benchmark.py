"""The benchmark of many clients: what it would tell, and a few seconds of it."""

import json
from pathlib import Path

import pytest

from benchmarks.load_clients import percentile
from benchmarks.load_images import make_cases
from benchmarks.load_ledger import NOTHING, Ledger
from tests.apps.test_fault_benchmarks import run


def written(*writes: tuple[str, float, float, bool | None]) -> Ledger:
    ledger = Ledger()
    for digest, start, end, done in writes:
        ledger.end("a", ledger.begin("a", digest, start), end, done=done)
    return ledger


def test_the_last_of_two_writes_one_after_the_other_is_the_label() -> None:
    ledger = written(("one", 0, 1, True), ("two", 2, 3, True))
    assert ledger.possible("a", 4, 5) == {"two"}
    assert ledger.possible("a", 2.5, 2.6) == {"one", "two"}  # the second was under way
    assert ledger.possible("a", 1.5, 1.6) == {"one"}
    assert ledger.possible("a", 0.2, 0.3) == {NOTHING, "one"}
    assert ledger.possible("b", 4, 5) == {NOTHING}


def test_of_two_writes_at_the_same_time_either_may_be_the_label() -> None:
    assert written(("one", 0, 2, True), ("two", 1, 3, True)).possible("a", 4, 5) == {"one", "two"}


def test_a_write_that_failed_may_have_been_done_and_a_refused_one_has_not() -> None:
    failed = written(("one", 0, 1, True), ("two", 2, 3, None))
    assert failed.possible("a", 9, 9) == {"one", "two"}
    refused = written(("one", 0, 1, True), ("two", 2, 3, False), (NOTHING, 2, 3, None))
    assert refused.possible("a", 9, 9) == {"one", NOTHING}
    assert refused.acknowledged("a") == {"one"}


def test_each_label_is_another_file_with_the_structures_of_its_image(tmp_path: Path) -> None:
    for case in make_cases(tmp_path, 3, 1, seed=1):
        one, other = case.label("1", 0.0), case.label("2", 0.0)
        assert one != other
        assert (case.mask(one) == case.truth()).all()
        assert set(map(int, case.mask(other).ravel())) == {0, 1, 2}


def test_percentiles_are_values_that_were_measured() -> None:
    assert [percentile([3, 1, 2, 4], share) for share in (0.5, 0.95, 1.0)] == [2, 4, 4]
    assert percentile([], 0.5) == 0


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--plain"]], ids=["serve", "plain"])
def test_a_few_seconds_of_load_find_nothing_lost(tmp_path: Path, more: list[str]) -> None:
    options = ["--minutes", "0.2", "--clients", "3", "--images", "8", "--volumes", "1"]
    done = run("load.py", *options, "--train-every", "4", "--out", str(tmp_path), *more)
    told = json.loads((tmp_path / f"{'plain' if more else 'serve'}.json").read_text())
    assert (told["labels_wrong"], told["bank_wrong"]) == (0, 0), done.stdout
    assert told["labels"] > 4
    if not more:
        assert done.returncode == 0, done.stdout + done.stderr
