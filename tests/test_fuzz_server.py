"""Some of the cases of `tests/fuzz_server.py`, always the same ones, against a real ki-serve."""

from pathlib import Path

from .fuzz_server import GROWTH, run

CASES = 250


def test_whatever_is_sent_the_server_goes_on(fetch_bundle: Path) -> None:
    counts, grown = run(fetch_bundle, CASES, seed=1)
    assert sum(counts.values()) == CASES and grown <= GROWTH
    ends = {end for _, end in counts}
    assert {"answered", "refused", "ended"} <= ends
    assert len({kind for kind, _ in counts}) == 11
