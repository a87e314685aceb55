"""What clients send for an option, and what is made of it."""

import pytest

from lib.errors import RequestError
from lib.request_options import number, truth, whole


@pytest.mark.parametrize("sent", [3, 3.0, "3", " 3 "])
def test_a_whole_number_in_any_dress(sent: object) -> None:
    found = whole({"k": sent}, "k", 8, 1, 64)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize("sent", [None, ""])
def test_what_is_not_said_is_the_default(sent: object) -> None:
    assert whole({"k": sent}, "k", 8, 1, 64) == whole({}, "k", 8, 1, 64) == 8
    assert truth({"k": sent}, "k", True) is True
    assert number({"k": sent}, "k", 0.5, 0, 1) == 0.5


@pytest.mark.parametrize("sent", [0, 65, 3.5, "three", True, {}, [3], "nan", "inf", 10**400])
def test_what_is_no_whole_number_in_range_is_told(sent: object) -> None:
    with pytest.raises(RequestError, match="k .* not allowed; it is a whole number from 1 to 64"):
        whole({"k": sent}, "k", 8, 1, 64)


def test_large_bounds_are_written_out() -> None:
    with pytest.raises(RequestError, match="from 0 to 2147483647"):
        whole({"seed": -1}, "seed", 0, 0, 2**31 - 1)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [(True, True), ("true", True), ("On", True), (1, True), (False, False), ("no", False)],
)
def test_yes_and_no(sent: object, meant: bool) -> None:
    assert truth({"flagged": sent}, "flagged", not meant) is meant


def test_neither_yes_nor_no_is_told() -> None:
    with pytest.raises(RequestError, match="flagged 'maybe' is not allowed; it is true or false"):
        truth({"flagged": "maybe"}, "flagged", False)
