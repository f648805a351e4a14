"""Files from strangers: a clear error or the right load, and the model untouched otherwise."""

import json
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeModel, hooks

from . import damage

RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(12, 4)).astype("float32"), RNG.normal(size=(12, 1)).astype("float32")
# What Keras, h5py and zipfile raise, and what is raised here.
CLEAR = (ValueError, OSError, KeyError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile)
CLEAR = (*CLEAR, json.JSONDecodeError, UnicodeDecodeError, NotImplementedError)
NUM_SEEDS = {"weights.h5": 13, "keras": 7}


def make(seed=1, history=4, units=5):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(units, name="first")(inputs)
    hidden = keras.layers.Dropout(0.2)(keras.layers.BatchNormalization(name="norm")(hidden))
    model = TapeModel(inputs, keras.layers.Dense(1, name="last")(hidden))
    made = [hooks.SkipSpikes(9.0), hooks.PercentileClipping(30, history=history)]
    model.compile(keras.optimizers.Adam(0.01), "mse", gradient_hooks=made)
    model.fit(X, Y, batch_size=4, verbose=0)
    return model


def held(model):
    """The variables that a file holds: weights, seeds, optimizer, hooks."""
    of_hooks = [v for hook in model.gradient_hooks for v in hook.variables]
    seeds = [v for v in model.variables if v.dtype != "float32"]
    return [*model.weights, *model.optimizer.variables, *of_hooks, *seeds]


def state_of(model):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in held(model)]


def set_state(model, values):
    for variable, value in zip(held(model), values, strict=True):
        variable.assign(value)


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model's state and its two files, and another model that has been trained otherwise."""
    folder = tmp_path_factory.mktemp("files")
    model, other = make(1), make(2)
    model.save(folder / "good.keras")
    model.save_weights(folder / "good.weights.h5")
    return folder, model, state_of(model), other, state_of(other)


def outcome(saved, path, load):
    """Returns what a load did: an error, a load that is right, or one that says what is not."""
    _, model, right, other, before = saved
    set_state(other, before)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            loaded = load(other, path)
        except CLEAR as error:
            assert str(error)
            assert same(state_of(other), before), "an error, and the model is changed"
            return "error"
    found = state_of(loaded)
    if same(found, right):
        return "right"
    texts = [str(w.message) for w in told]
    # The only load that is not the whole: hooks, or an optimizer, that the file has nothing of.
    assert any("no state of the hooks" in t or "Skipping variable loading" in t for t in texts)
    count = len(model.weights)
    assert same(found[:count], right[:count]), "other weights, without an error"
    return "told"


def load_weights(model, path):
    model.load_weights(path)
    return model


def load_model(model, path):
    return keras.models.load_model(path)


def try_all(saved, ending, load, kinds, seeds):
    """Loads a damaged file of each kind and seed, and returns how often which came of it."""
    counts = {}
    for kind in kinds:
        for seed in seeds:
            # A file of its own: a load that raised may have left the last one open.
            path = saved[0] / f"{kind}_{seed}.{ending}"
            damage.damaged(saved[0] / f"good.{ending}", kind, 1000 * len(kind) + seed, path)
            found = outcome(saved, path, load)
            counts.setdefault(kind, {}).setdefault(found, 0)
            counts[kind][found] += 1
    return counts


def test_a_few_damaged_files(saved):
    for ending in NUM_SEEDS:
        counts = try_all(saved, ending, load_weights, damage.KINDS, range(2))
        assert counts["hook_state_too_much"] == {"right": 2}
        assert "right" not in counts["one_value"]
        assert "right" not in counts["hook_state_lost"]
        assert counts["hook_state_renamed"] == {"told": 2}


@pytest.mark.slow
@pytest.mark.parametrize("ending", NUM_SEEDS)
def test_three_hundred_damaged_files(saved, ending):
    seeds = range(10, 10 + NUM_SEEDS[ending])
    counts = try_all(saved, ending, load_weights, damage.KINDS, seeds)
    if ending == "keras":
        more = try_all(saved, ending, load_model, [*damage.OF_BYTES, "hook_state_lost"], range(4))
        assert "right" not in more["hook_state_lost"]
    assert sum(sum(c.values()) for c in counts.values()) == 15 * NUM_SEEDS[ending]


def test_files_of_other_models(saved, tmp_path):
    """Of other layers, and of hooks with other arguments."""
    other = saved[3]
    before = state_of(other)
    for options in ({"units": 6}, {"history": 9}):
        make(**options).save_weights(tmp_path / "bad.weights.h5")
        # Keras's own word for what the first error leads to.
        with warnings.catch_warnings(), pytest.raises(ValueError, match="shape"):
            warnings.filterwarnings("ignore", message="Skipping nested container")
            other.load_weights(tmp_path / "bad.weights.h5")
        assert same(state_of(other), before)
    (tmp_path / "folder.keras").mkdir()
    for name in ("none.weights.h5", "none.keras", "folder.keras"):
        with pytest.raises((OSError, ValueError)):
            other.load_weights(tmp_path / name)
    (tmp_path / "archive.weights.h5").write_bytes((saved[0] / "good.keras").read_bytes())
    with pytest.raises(OSError):
        other.load_weights(tmp_path / "archive.weights.h5")
    assert same(state_of(other), before)
    other.train_on_batch(X, Y)


def test_weights_that_do_not_fit_are_not_set_in_part(saved):
    other = saved[3]
    before, weights = state_of(other), [w + 1 for w in other.get_weights()]
    weights[-1] = np.zeros((7, 7))
    with pytest.raises(ValueError, match="shape"):
        other.set_weights(weights)
    assert same(state_of(other), before)


def test_a_file_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    model = saved[1]

    def fail(store):
        raise RuntimeError("the disk is full")

    for name, save in (("a.keras", model.save), ("a.weights.h5", model.save_weights)):
        path = tmp_path / name
        save(path)
        good = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(model._tapefit_state, "save_own_variables", fail)
            with pytest.raises(RuntimeError, match="the disk is full"):
                save(path)
        assert path.read_bytes() == good
        assert [p.name for p in tmp_path.glob("*unfinished*")] == []


def test_state_of_hooks_that_come_later_is_kept(saved, tmp_path):
    """A file with more hooks than the model has: theirs when they are added."""
    model = make(2)
    model.gradient_hooks.clear()
    model.load_weights(saved[0] / "good.weights.h5")
    hook = model.gradient_hooks.add(hooks.PercentileClipping(30, history=4))
    model.apply_gradients([])
    expected = saved[1].gradient_hooks["percentile_clipping"].variables
    for a, b in zip(hook.variables, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_hook_that_has_no_state_yet_is_not_missed(tmp_path):
    inputs = keras.Input((4,))
    model = TapeModel(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse", gradient_hooks=[hooks.PercentileClipping()])
    model.save(tmp_path / "new.keras")
    loaded = keras.models.load_model(tmp_path / "new.keras")
    loaded.train_on_batch(X, Y)


def test_hooks_that_are_made_after_a_load_are_told(saved, tmp_path):
    """The hook of a model that is not trained yet is made with its first step."""
    with h5py.File(saved[0] / "good.weights.h5") as source:
        with h5py.File(tmp_path / "bad.weights.h5", "w") as file:
            for name in ("layers", "optimizer"):
                source.copy(name, file)
    inputs = keras.Input((4,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(5)(inputs))
    model = TapeModel(inputs, keras.layers.Dense(1)(keras.layers.Dropout(0.2)(hidden)))
    model.compile(keras.optimizers.Adam(0.01), "mse", gradient_hooks=[hooks.SkipSpikes(9.0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Skipping variable loading")
        model.load_weights(tmp_path / "bad.weights.h5")
    with pytest.warns(UserWarning, match="no state of the hooks skip_spikes"):
        model.train_on_batch(X, Y)
    model.train_on_batch(X, Y)


CODE = {
    "class_name": "__lambda__",
    "config": {"value": "4wEAAAAAAAAAAAAAAA==", "defaults": None, "closure": None},
}
ELSEWHERE = {
    "module": "os",
    "class_name": "system",
    "config": {"command": "touch ran"},
    "registered_name": "system",
}
FUNCTION = {
    "module": "builtins",
    "class_name": "function",
    "config": "eval",
    "registered_name": "function",
}
PLACES = {
    "hook": lambda c, code: c["gradient_hooks"][1].update(hook=code),
    "argument": lambda c, code: c["gradient_hooks"][1]["hook"]["config"].update(
        percentile={"function": code}
    ),
    "schedule": lambda c, code: c["gradient_hooks"][1]["hook"]["config"].update(
        percentile={"schedule": code}
    ),
    "targets": lambda c, code: c["gradient_hooks"][1]["hook"]["config"].update(targets=code),
    "backward": lambda c, code: c.update(backward=code),
    "optimizer": lambda c, code: c.update(optimizer=code),
    "loss": lambda c, code: c.update(loss=code),
}


@pytest.mark.parametrize("code", [CODE, ELSEWHERE, FUNCTION], ids=["lambda", "os", "eval"])
@pytest.mark.parametrize("place", PLACES)
def test_safe_mode_runs_no_code(saved, tmp_path, monkeypatch, place, code):
    monkeypatch.chdir(tmp_path)

    def change(config):
        PLACES[place](config["compile_config"], code)

    damage.with_config(saved[0] / "good.keras", tmp_path / "bad.keras", change)
    with pytest.raises((ValueError, TypeError)):
        model = keras.models.load_model(tmp_path / "bad.keras")
        model.train_on_batch(X, Y)
    assert not (tmp_path / "ran").exists()


@keras.saving.register_keras_serializable("test_files")
class Private(TapeModel):
    """Has a layer whose private name Keras saves after all of the library's."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._zone = keras.layers.Dense(2)
        self.bare = tf.Variable(1.0)

    def call(self, x):
        return self.bare * self._zone(x)


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_what_keras_saves_later_is_no_damage(name, tmp_path):
    model = Private()
    model.compile("adam", "mse", gradient_hooks=[hooks.PercentileClipping()])
    x = np.ones((4, 3), "float32")
    model.fit(x, x[:, :2], verbose=0)
    if name.endswith(".keras"):
        model.save(tmp_path / name)
        loaded = keras.models.load_model(tmp_path / name)
    else:
        model.save_weights(tmp_path / name)
        loaded = Private()
        loaded.compile("adam", "mse", gradient_hooks=[hooks.PercentileClipping()])
        loaded.train_on_batch(x, x[:, :2])
        loaded.load_weights(tmp_path / name)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
