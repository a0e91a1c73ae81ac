"""A small sample of the fuzzers of the engine and of head profiles; the others' are in their own test files."""

from tests import fuzz_engine, fuzz_profiles


def test_the_engine_answers_right_or_refuses():
    counts = fuzz_engine.fuzz(50, seed=7)
    assert not counts.get("wrong") and counts["right"] >= 15 and counts["refused"] >= 10


def test_head_profiles_are_read_right_or_refused():
    counts = fuzz_profiles.fuzz(200, seed=7)
    assert not counts.get("wrong") and counts["right"] >= 50 and counts["refused"] >= 50
