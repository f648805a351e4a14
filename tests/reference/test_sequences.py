"""Any sequence of what a user may do to a model between trainings, against the reference.

Hooks are added, removed, moved and given other numbers, variables are frozen and unfrozen,
the model is compiled again, trained, saved and loaded, in any order.
"""

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from keras import layers

from keras_tapefit import TapeModel, backward, hooks

from . import reference

# Keras saves no slots of an optimizer that made no update yet, and says so of what it loads;
# and hooks come in any order.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Skipping variable loading for optimizer:UserWarning",
    "ignore:.* comes before .*:UserWarning",
    "ignore:.* comes after .*:UserWarning",
)
BATCH_SIZE = 4
RNG = np.random.default_rng(23)
X = RNG.normal(size=(16, 3, 4))
TOKENS = RNG.integers(0, 5, size=(16, 3)).astype("int32")
Y = RNG.normal(size=(16, 3, 2))
BAD = 5


@keras.saving.register_keras_serializable("sequences")
def grow(gradient, variable):
    return gradient * (1.0 + 0.3 * tf.norm(gradient))


@dataclass(eq=False)
class Hook:
    """A hook of the reference, whose numbers may be changed."""

    function: object
    numbers: dict = field(default_factory=dict)

    def __call__(self, gradients, state):
        return self.function(gradients, state, **self.numbers)


def unchanged(gradients, state):
    return gradients


# What makes the hook, the reference's, and a number that may be assigned
HOOKS = {
    "function": (lambda: hooks.LambdaHook(grow), reference.grow, None),
    "global norm": (lambda: hooks.GlobalNormClipping(0.3), reference.clip_global, "max_norm"),
    "norm": (lambda: hooks.NormClipping(0.1), reference.clip_each, "max_norm"),
    "percentile": (
        lambda: hooks.PercentileClipping(30, history=4),
        reference.clip_percentile,
        None,
    ),
    "centralization": (lambda: hooks.Centralization(), reference.centralize, None),
    "gate": (lambda: hooks.SkipNonFinite(), unchanged, None),
    "none": (lambda: hooks.UpdateMonitor(), unchanged, None),
    "monitor": (lambda: hooks.GradientMonitor(), unchanged, None),
}
OPTIMIZERS = {
    "SGD": lambda **a: keras.optimizers.SGD(0.1, momentum=0.9, **a),
    "Adam": lambda **a: keras.optimizers.Adam(0.02, epsilon=1e-4, **a),
    "RMSprop": lambda **a: keras.optimizers.RMSprop(0.01, epsilon=1e-4, **a),
}
MODES = {
    "graph": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
    "update in XLA": {"jit_compile": "update"},
    "executions": {"jit_compile": False, "steps_per_execution": 2},
}
NAMES = ["hidden/kernel", "hidden/bias", "end/kernel", "end/bias"]
TARGETS = {"hidden/*": NAMES[:2], "end/kernel": [NAMES[2]], "*/bias": [NAMES[1], NAMES[3]]}


def build(kind):
    if kind == "embedding":
        inputs = keras.Input((3,), dtype="int32")
        h = layers.Embedding(5, 4, name="table", dtype="float64")(inputs)
    else:
        h = inputs = keras.Input((3, 4), dtype="float64")
    hidden = layers.Dense(4, activation="tanh", name="hidden", dtype="float64")
    h = hidden(hidden(h) if kind == "shared layer" else h)
    return TapeModel(inputs, layers.Dense(2, name="end", dtype="float64")(h))


def name_of(variable):
    return "/".join(variable.path.split("/")[-2:])


class Sequence:
    """A model and the reference, to which the same is done.

    Args:
        random: draws what is done.
        modes: names in `MODES`.
    """

    def __init__(self, random, modes):
        keras.utils.set_random_seed(3)
        self.random, self.modes = random, modes
        # In words, for the case that something is wrong.
        self.done = []
        self.kind = random.choice(["functional", "embedding", "shared layer"])
        self.frozen, self.made = set(), []
        self.model = build(self.kind)
        start = {name_of(v): v.numpy() for v in self.model.weights}
        optimizer = random.choice(sorted(OPTIMIZERS))
        t = reference.Training(self.kind, reference.Loss(), [("", OPTIMIZERS[optimizer])], [])
        self.loop = reference.Loop(t, start)
        self.compile(optimizer, random.choice([1, 2, 3]), 1, modes[0], 0.0)
        if self.kind == "embedding":
            # Without a hook it is Keras, whose optimizers take a row that comes twice for two.
            self.model.register_gradient_hook(hooks.UpdateMonitor())
            self.made.append(("none", Hook(unchanged)))
            self.follow()

    def run(self, num_rounds):
        """Makes some changes and a training, so many times."""
        try:
            for _ in range(num_rounds):
                possible = [self.save, self.save_weights, self.compile_again, self.add, self.add]
                possible += [self.remove, self.assign] if self.made else []
                possible += [self.reverse] if len(self.made) > 1 else []
                if not self.loop.window:
                    # In the middle of a window a part of it would have no gradient.
                    possible += [self.freeze] + [self.unfreeze] * bool(self.frozen)
                self.random.choice(possible)()
                self.random.choice([self.fit, self.fit, self.train_on_batch])()
        except Exception as error:
            error.add_note("\n".join([self.kind, *self.done]))
            raise

    def note(self, *words):
        self.done.append(" ".join(map(str, words)))

    # --- Changes

    def compile(self, optimizer, window, micro_batches, mode, uphill):
        self.note("compile", optimizer, window, micro_batches, mode, uphill)
        steps = {"gradient_accumulation_steps": window} if window > 1 else {}
        made = OPTIMIZERS[optimizer](**steps) if optimizer else self.model.optimizer
        method = backward.SharpnessAware(uphill) if uphill else backward.Backpropagation()
        self.options = {"loss": "mse", "micro_batches": micro_batches, **MODES[mode]}
        self.model.compile(made, backward=method, **self.options)
        self.loop.change(window=window, uphill=uphill)
        if optimizer:
            self.loop.change(optimizers=[("", OPTIMIZERS[optimizer])])

    def compile_again(self):
        # The optimizer there is stays with its slots and its window.
        optimizer = self.random.choice([None, *sorted(OPTIMIZERS)])
        window = self.random.choice([1, 2, 3]) if optimizer else self.loop.t.window
        micro_batches, uphill = self.random.choice([1, 1, 2, 3]), 0.0
        if window == 1 and micro_batches == 1:
            # Each part has a point uphill of its own.
            uphill = self.random.choice([0.0, 0.05])
        self.compile(optimizer, window, micro_batches, self.random.choice(self.modes), uphill)

    def add(self):
        left = sorted(HOOKS.keys() - {kind for kind, _ in self.made})
        if not left:
            return
        kind, how = self.random.choice(left), self.random.choice(["first", "compile", "register"])
        self.note("add", kind, how)
        make, function, _ = HOOKS[kind]
        self.made.insert(0 if how == "first" else len(self.made), (kind, Hook(function)))
        if how == "first":
            self.model.gradient_hooks.add(make(), index=0)
        elif how == "register":
            self.model.register_gradient_hook(make())
        else:
            there = [*self.model.gradient_hooks, make()]
            self.model.compile(self.model.optimizer, gradient_hooks=there, **self.options)
        self.follow()

    def follow(self):
        names = [kind for kind, _ in self.made]
        self.loop.change(hooks=[hook for _, hook in self.made], gate="gate" in names)

    def remove(self):
        place = self.random.randrange(len(self.made))
        if self.made[place][0] == "none":
            return
        self.note("remove", self.made[place][0])
        del self.made[place]
        self.model.gradient_hooks.remove(self.model.gradient_hooks[place])
        self.follow()

    def reverse(self):
        self.note("reverse")
        self.made.reverse()
        self.model.gradient_hooks.reverse()
        self.follow()

    def assign(self):
        places = [i for i, (kind, _) in enumerate(self.made) if HOOKS[kind][2]]
        if not places:
            return
        place, value = self.random.choice(places), self.random.choice([0.05, 0.2, 1.0])
        kind, hook = self.made[place]
        self.note("assign", kind, value)
        setattr(self.model.gradient_hooks[place], HOOKS[kind][2], value)
        hook.numbers[HOOKS[kind][2]] = value

    def freeze(self):
        which = self.random.choice(sorted(TARGETS))
        if self.frozen | set(TARGETS[which]) < set(NAMES):
            self.note("freeze", which)
            self.model.freeze(which)
            self.frozen |= set(TARGETS[which])
            self.loop.change(frozen=functools.partial(_these, frozenset(self.frozen)))

    def unfreeze(self):
        which = self.random.choice(sorted(TARGETS))
        self.note("unfreeze", which)
        self.model.unfreeze(which)
        self.frozen -= set(TARGETS[which])
        self.loop.change(frozen=functools.partial(_these, frozenset(self.frozen)))

    def save(self):
        self.note("save and load")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            self.model.save(path)
            self.model = keras.saving.load_model(path)
        self.compare()

    def save_weights(self):
        self.note("save and load weights")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.weights.h5"
            self.model.save_weights(path)
            # Another model of the same kind, compiled alike.
            config = self.model.get_compile_config()
            self.model = build(self.kind)
            self.model.compile_from_config(config)
            self.model.load_weights(path)
        self.compare()

    # --- Trainings

    def data(self, first, last):
        """Returns examples for `fit`, and as batches for the reference."""
        x = (TOKENS if self.kind == "embedding" else X)[first:last]
        y = Y[first:last].copy()
        if self.loop.t.gate and first <= BAD < last:
            y[BAD - first, 0, 0] = np.nan
        found = {"x": x, "y/end": y, "tokens": np.ones(x.shape[:2], "int32")}
        sizes = range(0, len(x), BATCH_SIZE)
        return x, y, [{k: v[i : i + BATCH_SIZE] for k, v in found.items()} for i in sizes]

    def fit(self):
        number, epochs = self.random.randrange(3, 17), self.random.choice([1, 2])
        self.note("fit", number, epochs)
        x, y, expected = self.data(0, number)
        logs = self.model.fit(
            x, y, batch_size=BATCH_SIZE, epochs=epochs, shuffle=False, verbose=0
        ).history
        self.loop.change(leftovers=True)
        for _ in range(epochs):
            self.loop.epoch(0, expected)
        right = self.loop.logs["loss"][-epochs:]
        np.testing.assert_allclose(logs["loss"], right, rtol=1e-5)
        self.compare()
        if self.random.random() < 0.3:
            self.look()

    def train_on_batch(self):
        """Which may leave a window half full."""
        first = self.random.randrange(12)
        self.note("train_on_batch", first)
        x, y, expected = self.data(first, first + BATCH_SIZE)
        self.model.train_on_batch(x, y)
        self.loop.change(leftovers=False)
        self.loop.epoch(0, expected)
        self.compare()

    def look(self):
        """Which changes nothing."""
        x, y, _ = self.data(12, 16)
        before = self.model.get_weights()
        self.model.evaluate(x, y, verbose=0)
        self.model.compute_gradients(x, y)
        for a, b in zip(before, self.model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def compare(self):
        trained = {name_of(v) for v in self.model.trainable_variables}
        assert trained == set(self.loop.variables) - self.frozen
        for variable in self.model.weights:
            right = self.loop.variables[name_of(variable)].numpy()
            found = variable.numpy()
            assert np.isfinite(right).all()
            error = np.abs(found - right).max() / max(1.0, np.abs(right).max())
            assert error < 1e-6, f"{variable.path} is off by {error:.1e}"


def _these(names, epoch):
    return names


# The same sequences in every run. What fails is not made shorter, which takes long.
fixed = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@fixed
@given(random=st.randoms(use_true_random=True))
def test_short_sequences(random):
    """Without XLA, which is slow to compile."""
    keras.utils.clear_session()
    Sequence(random, ["graph", "eager"]).run(5)


@pytest.mark.slow
@settings(fixed, max_examples=30)
@given(random=st.randoms(use_true_random=True))
def test_sequences(random):
    keras.utils.clear_session()
    # XLA takes long to compile, and comes less often.
    Sequence(random, [*MODES, "graph", "eager", "executions"]).run(8)
