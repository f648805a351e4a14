"""Collections pass over what was there before a search, while it runs and no longer."""

from __future__ import annotations

import gc
import weakref

import keras
import pytest

from keras_tapefit import tuning
from keras_tapefit.tuning import garbage


class Cycle:
    def __init__(self):
        self.itself = self


class Collects(keras.callbacks.Callback):
    """Makes cycles, and counts the objects that collections pass over."""

    dead: list = []
    counts: list = []

    def on_epoch_end(self, epoch, logs=None):
        reference = weakref.ref(Cycle())
        gc.collect()
        self.dead.append(reference() is None)
        self.counts.append(gc.get_freeze_count())


@pytest.fixture
def nothing_set_aside():
    gc.unfreeze()
    Collects.dead.clear()
    Collects.counts.clear()
    yield
    gc.collect()
    gc.freeze()


def run(search, build, data, reuse=True):
    tuner = search(tuning.TapeHyperModel(build, reuse=reuse, parts=()), max_trials=2)
    tuner.search(*data, epochs=1, verbose=0, callbacks=[Collects()])


@pytest.mark.slow
def test_what_was_there_before_is_set_aside(nothing_set_aside, search, light, data):
    before = len(gc.get_objects())
    run(search, light, data)
    # What the search itself leaves behind is collected all along.
    assert Collects.dead == [True, True]
    assert min(Collects.counts) > before / 2
    garbage_from_before = weakref.ref(Cycle())
    gc.collect()
    assert gc.get_freeze_count() == 0
    assert garbage_from_before() is None


@pytest.mark.slow
def test_nothing_is_lost(nothing_set_aside, search, light, data):
    kept = Cycle()
    reference = weakref.ref(kept)

    class DropsIt(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            nonlocal kept
            kept = None

    tuner = search(tuning.TapeHyperModel(light, reuse=True), max_trials=1)
    tuner._deepcopy_callbacks = list
    tuner.search(*data, epochs=1, verbose=0, callbacks=[DropsIt(), Collects()])
    assert Collects.dead == [True] and reference() is not None
    gc.collect()
    assert reference() is None


@pytest.mark.slow
def test_a_search_that_fails_puts_it_back(nothing_set_aside, search, light, data):
    class Interrupts(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert gc.get_freeze_count()
            raise KeyboardInterrupt

    tuner = search(tuning.TapeHyperModel(light, reuse=True), max_trials=1)
    with pytest.raises(KeyboardInterrupt):
        tuner.search(*data, epochs=1, verbose=0, callbacks=[Interrupts()])
    gc.collect()
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [True, False])
def test_outside_a_search_nothing_is_set_aside(reuse, nothing_set_aside, search, light, data):
    tuner = search(tuning.TapeHyperModel(light, reuse=reuse), max_trials=1)
    tuner.hypermodel.build(tuner.oracle.get_space())
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_without_reuse_nothing_is_set_aside(nothing_set_aside, search, light, data):
    run(search, light, data, reuse=False)
    assert Collects.counts == [0, 0]


@pytest.mark.slow
def test_what_others_set_aside_stays_theirs(nothing_set_aside, search, light, data):
    gc.freeze()
    count = gc.get_freeze_count()
    run(search, light, data)
    gc.collect()
    assert 0.9 * count < gc.get_freeze_count() <= count
    assert not garbage._is_set_aside
