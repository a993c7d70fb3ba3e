"""Where the seconds go, and what counts as going on."""

import threading

import pytest

from llm_dist.train import watch as module
from llm_dist.train.watch import Watch


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told: clock[0] is now."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def spend(watch, clock, *phases):
    for name, seconds in phases:
        with watch.phase(name):
            clock[0] += seconds


def test_seconds_by_phase_and_the_rest(clock):
    watch = Watch()
    watch.begin()
    spend(watch, clock, ("data", 1), ("step", 3), ("data", 0.5))
    clock[0] += 2
    assert watch.take() == {"data": 1.5, "step": 3.0, "other": 2.0, "all": 6.5}
    clock[0] += 1
    assert watch.take() == {"other": 1.0, "all": 1.0}


def test_what_comes_before_training_is_in_the_whole_but_not_in_its_speed(clock):
    watch = Watch()
    clock[0] += 1
    spend(watch, clock, ("build", 2))
    watch.begin()
    spend(watch, clock, ("step", 4))
    assert watch.take() == {"step": 4.0, "other": 0.0, "all": 4.0}
    assert watch.totals() == {"start": 1.0, "build": 2.0, "loop": 0.0, "step": 4.0}


def test_every_instant_belongs_to_one_phase_also_inside_another_and_where_one_raises(clock):
    watch = Watch()
    watch.begin()
    with pytest.raises(LookupError), watch.phase("save"):
        clock[0] += 1
        spend(watch, clock, ("replicas", 2))
        clock[0] += 4
        raise LookupError
    assert watch.doing == "loop"
    clock[0] += 8
    assert watch.take() == {"replicas": 2.0, "save": 5.0, "other": 8.0, "all": 15.0}
    assert sum(watch.totals().values()) == 15.0


def test_steps_that_were_finished_before_are_replayed(clock):
    watch = Watch()
    watch.furthest_step = 2
    for step in range(1, 4):
        spend(watch, clock, ("data", 1), ("step", 10))
        watch.step = step
    assert watch.totals() == {"start": 0.0, "replayed": 22.0, "data": 1.0, "step": 10.0}
    watch.step = 1  # a rewind
    spend(watch, clock, ("step", 10), ("eval", 5))
    assert watch.totals() == {"start": 0.0, "replayed": 32.0, "data": 1.0, "step": 10.0, "eval": 5.0}


def test_the_first_step_of_an_attempt_is_a_phase_of_its_own(clock):
    watch = Watch()
    for seconds in (60, 2, 3, 10):
        with watch.stepping():
            clock[0] += seconds
    assert watch.totals() == {"start": 0.0, "first_step": 60.0, "step": 15.0}
    assert watch.take() == {"step": 75.0, "other": 0.0, "all": 75.0}
    assert watch.median_step_seconds() == 3.0
    assert Watch().median_step_seconds() == 0.0


def test_it_goes_on_with_each_phase_step_micro_batch_and_call(clock):
    watch = Watch()

    def moves(action):
        before = watch.place().moves
        action()
        return watch.place().moves - before

    def step():
        watch.step += 1

    assert moves(lambda: None) == moves(watch.take) == moves(watch.totals) == 0
    assert moves(step) == 1
    assert moves(lambda: spend(watch, clock, ("eval", 1))) == 2
    batches = watch.marking(iter("abc"))
    assert len(batches) == 3
    assert moves(lambda: list(batches)) == 3
    assert moves(lambda: watch.marked(max)(1, 2)) == 1
    assert watch.marked(max)(1, 2) == 2


def test_another_thread_sees_where_it_is(clock):
    watch, found = Watch(), []
    watch.step = 7
    with watch.phase("data"):
        clock[0] += 3
        thread = threading.Thread(target=lambda: found.append(watch.place()))
        thread.start()
        thread.join()
    (place,) = found
    assert (place.step, place.phase, place.phase_seconds) == (7, "data", 3.0)


@pytest.mark.parametrize(("phase", "is_told"), [("data", False), ("step", False), ("save", True), ("eval", True)])
def test_long_phases_are_told_at_once(phase, is_told):
    watch = Watch()
    with watch.phase(phase):
        assert watch.changed.is_set() is is_told
