"""A slice of the fuzzed requests, see `tests.fuzz.requests`."""

from tests.fuzz.requests import is_right, run


def test_malformed_requests_are_refused():
    report = run(count=15, seed=0)
    assert is_right(report), report
