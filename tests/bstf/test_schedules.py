"""Schedules against their formulas, and as functions that only rise."""

import itertools

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf.schedules import Cubic, OneShot, Steps
from bstf.selection import kept_blocks

RATIOS = st.floats(0, 0.99)
SCHEDULES = st.one_of(
    st.builds(OneShot, RATIOS, at=st.integers(0, 9)),
    st.builds(Steps, RATIOS, every=st.integers(1, 5), fraction=st.floats(0.01, 1), begin=st.integers(0, 9)),
    st.builds(
        lambda ratio, begin, length, every, part: Cubic(ratio, begin + length, begin, every, ratio * part),
        RATIOS,
        st.integers(0, 9),
        st.integers(1, 30),
        st.integers(1, 7),
        st.floats(0, 1),
    ),
)


@settings(deadline=None)
@given(schedule=SCHEDULES, blocks=st.integers(1, 500))
def test_a_schedule_rises_to_its_ratio_and_stays(schedule, blocks):
    ratios = [schedule(time, blocks) for time in range(600)]
    assert all(a <= b for a, b in itertools.pairwise(ratios))
    assert ratios[0] >= 0 and ratios[-1] == schedule.ratio


@settings(deadline=None)
@given(schedule=SCHEDULES)
def test_serialisation(schedule):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    assert again == schedule and type(again) is type(schedule)


def test_one_shot():
    assert [OneShot(0.5, at=2)(time, 16) for time in range(4)] == [0, 0, 0.5, 0.5]
    assert OneShot(0.25)(0, 16) == 0.25


def test_cubic_is_the_formula_of_zhu_and_gupta():
    schedule = Cubic(0.8, end=110, begin=10, every=20, initial=0.2)
    for time in range(10, 110):
        steps = (time - 10) // 20  # t = t0 + steps * dt, n dt = 100
        expected = 0.8 + (0.2 - 0.8) * (1 - steps * 20 / 100) ** 3
        assert schedule(time, 64) == pytest.approx(expected, rel=1e-12)
    assert schedule(9, 64) == 0 and schedule(110, 64) == 0.8
    assert Cubic(0.5, end=8)(4, 64) == 0.5 - 0.5 / 8


@settings(deadline=None)
@given(blocks=st.integers(1, 400), every=st.integers(1, 4))
def test_steps_take_5_percent_and_at_least_one_block_every_time(blocks, every):
    schedule = Steps(0.5, every=every)
    zeros = [blocks - kept_blocks(1, blocks, schedule(time, blocks), 0) for time in range(25 * every)]
    final = blocks - kept_blocks(1, blocks, 0.5, 0)
    for loss in range(24):
        now = zeros[loss * every]
        assert zeros[loss * every : (loss + 1) * every] == [now] * every
        assert now == min(final, int((loss + 1) * max(0.05 * blocks, 1) + 0.5))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: OneShot(1.0), "ratio is the fraction of zero blocks"),
        (lambda: OneShot(0.5, at=-1), "at must be a whole number of at least 0"),
        (lambda: Steps(0.5, every=0), "every must be a whole number of at least 1"),
        (lambda: Steps(0.5, fraction=0), "fraction is the part of the blocks lost at a time"),
        (lambda: Cubic(0.5, end=3, begin=3), "end must be a whole number of at least 4; got 3"),
        (lambda: Cubic(0.5, end=3.5), "end must be a whole number"),
        (lambda: Cubic(0.5, end=3, initial=0.6), "initial=0.6 is above ratio=0.5"),
    ],
)
def test_errors_are_sentences(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
