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
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from keras import layers

from keras_tapefit import TapeModel, backward, hooks

from . import reference

# Keras saves no slots of an optimizer that made no update yet, and says so of what it loads.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Skipping variable loading for optimizer:UserWarning"
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


class Sequence(RuleBasedStateMachine):
    """A model and the reference, to which the same is done."""

    modes = list(MODES)

    @initialize(
        kind=st.sampled_from(["functional", "embedding", "shared layer"]),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        window=st.integers(1, 3),
    )
    def begin(self, kind, optimizer, window):
        keras.utils.set_random_seed(3)
        self.kind = kind
        self.frozen, self.made, self.number = set(), [], 0
        self.options = {}
        self.model = build(kind)
        start = {name_of(v): v.numpy() for v in self.model.weights}
        t = reference.Training(kind, reference.Loss(), [("", OPTIMIZERS[optimizer])], [])
        self.loop = reference.Loop(t, start)
        self.compile(optimizer, window, 1, self.modes[0], 0.0)

    def compile(self, optimizer, window, micro_batches, mode, uphill):
        steps = {"gradient_accumulation_steps": window} if window > 1 else {}
        made = OPTIMIZERS[optimizer](**steps) if optimizer else self.model.optimizer
        method = backward.SharpnessAware(uphill) if uphill else backward.Backpropagation()
        self.options = {"loss": "mse", "micro_batches": micro_batches, **MODES[mode]}
        self.model.compile(made, backward=method, **self.options)
        self.loop.change(window=window, uphill=uphill)
        if optimizer:
            self.loop.change(optimizers=[("", OPTIMIZERS[optimizer])])

    # What a window is begun with it ends with.
    @precondition(lambda self: not self.loop.window)
    @rule(
        optimizer=st.sampled_from(["", *sorted(OPTIMIZERS)]),
        window=st.integers(1, 3),
        micro_batches=st.integers(1, 3),
        place=st.integers(0, 4),
        uphill=st.sampled_from([0.0, 0.0, 0.05]),
    )
    def compile_again(self, optimizer, window, micro_batches, place, uphill):
        if not optimizer:
            # The optimizer stays, with its slots and its window.
            window = self.loop.t.window
        if uphill:
            # Each part has a point uphill of its own.
            micro_batches = 1
            uphill = uphill if window == 1 else 0.0
        mode = self.modes[place % len(self.modes)]
        self.compile(optimizer, window, micro_batches, mode, uphill)

    @precondition(lambda self: not self.loop.window and len(self.made) < 4)
    @rule(
        kind=st.sampled_from(sorted(HOOKS)),
        first=st.booleans(),
        again=st.booleans(),
    )
    def add(self, kind, first, again):
        make, function, _ = HOOKS[kind]
        if kind in [k for k, _ in self.made]:
            return
        place = 0 if first else len(self.made)
        self.made.insert(place, (kind, Hook(function)))
        if first:
            self.model.gradient_hooks.add(make(), index=0)
        elif again:
            # The same hooks, and one more.
            kept = list(self.model.gradient_hooks)
            self.model.compile(
                self.model.optimizer,
                gradient_hooks=[*kept, make()],
                **self.options,
            )
        else:
            self.model.register_gradient_hook(make())
        self.follow()

    def follow(self):
        names = [kind for kind, _ in self.made]
        self.loop.change(hooks=[hook for _, hook in self.made], gate="gate" in names)

    @precondition(lambda self: not self.loop.window and self.made)
    @rule(place=st.integers(0, 9))
    def remove(self, place):
        place %= len(self.made)
        del self.made[place]
        self.model.gradient_hooks.remove(self.model.gradient_hooks[place])
        self.follow()

    @precondition(lambda self: not self.loop.window and len(self.made) > 1)
    @rule()
    def reverse(self):
        self.made.reverse()
        self.model.gradient_hooks.reverse()
        self.follow()

    @precondition(lambda self: not self.loop.window and self.made)
    @rule(place=st.integers(0, 9), value=st.sampled_from([0.05, 0.2, 1.0]))
    def assign(self, place, value):
        kind, hook = self.made[place % len(self.made)]
        number = HOOKS[kind][2]
        if number is not None:
            setattr(self.model.gradient_hooks[place % len(self.made)], number, value)
            hook.numbers[number] = value

    @precondition(lambda self: not self.loop.window)
    @rule(which=st.sampled_from(sorted(TARGETS)))
    def freeze(self, which):
        if self.frozen | set(TARGETS[which]) < set(NAMES):
            self.model.freeze(which)
            self.frozen |= set(TARGETS[which])
            self.loop.change(frozen=functools.partial(_these, frozenset(self.frozen)))

    @precondition(lambda self: not self.loop.window and self.frozen)
    @rule(which=st.sampled_from(sorted(TARGETS)))
    def unfreeze(self, which):
        self.model.unfreeze(which)
        self.frozen -= set(TARGETS[which])
        self.loop.change(frozen=functools.partial(_these, frozenset(self.frozen)))

    def data(self, first, last):
        """Returns examples for `fit`, and as batches for the reference."""
        x = (TOKENS if self.kind == "embedding" else X)[first:last]
        y = Y[first:last].copy()
        if self.loop.t.gate and first <= BAD < last:
            y[BAD - first, 0, 0] = np.nan
        found = {"x": x, "y/end": y, "tokens": np.ones(x.shape[:2], "int32")}
        sizes = range(0, len(x), BATCH_SIZE)
        return x, y, [{k: v[i : i + BATCH_SIZE] for k, v in found.items()} for i in sizes]

    @rule(
        batches=st.integers(1, 4),
        missing=st.integers(0, 1),
        epochs=st.integers(1, 2),
    )
    def fit(self, batches, missing, epochs):
        x, y, expected = self.data(0, batches * BATCH_SIZE - missing)
        logs = self.model.fit(
            x, y, batch_size=BATCH_SIZE, epochs=epochs, shuffle=False, verbose=0
        ).history
        self.loop.change(leftovers=True)
        for _ in range(epochs):
            self.loop.epoch(0, expected)
        right = self.loop.logs["loss"][-epochs:]
        np.testing.assert_allclose(logs["loss"], right, rtol=1e-5)
        self.compare()

    @rule(first=st.integers(0, 12))
    def train_on_batch(self, first):
        """Which may leave a window half full."""
        x, y, expected = self.data(first, first + BATCH_SIZE)
        self.model.train_on_batch(x, y)
        self.loop.change(leftovers=False)
        self.loop.epoch(0, expected)
        self.compare()

    @rule()
    def evaluate(self):
        x, y, _ = self.data(12, 16)
        before = self.model.get_weights()
        self.model.evaluate(x, y, verbose=0)
        self.model.compute_gradients(x, y)
        for a, b in zip(before, self.model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            self.model.save(path)
            self.model = keras.saving.load_model(path)
        self.compare()

    @rule()
    def save_and_load_weights(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.weights.h5"
            self.model.save_weights(path)
            # Another model of the same kind, compiled alike.
            config = self.model.get_compile_config()
            self.model = build(self.kind)
            self.model.compile_from_config(config)
            self.model.load_weights(path)
        self.compare()

    def compare(self):
        trained = {name_of(v) for v in self.model.trainable_variables}
        assert trained == set(self.loop.variables) - self.frozen
        for variable in self.model.weights:
            right = self.loop.variables[name_of(variable)].numpy()
            found = variable.numpy()
            assert np.isfinite(right).all()
            error = np.abs(found - right).max() / max(1.0, np.abs(right).max())
            assert error < 1e-6, f"{variable.path} is off by {error:.1e}"

    def teardown(self):
        keras.utils.clear_session()


def _these(names, epoch):
    return names


class Short(Sequence):
    """Without XLA, which is slow to compile."""

    modes = ["graph", "eager"]


# The same sequences in every run. What fails is not made shorter, which takes long.
fixed = settings(
    max_examples=3,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_short_sequences():
    run_state_machine_as_test(Short, settings=fixed)


@pytest.mark.slow
def test_sequences():
    run_state_machine_as_test(Sequence, settings=settings(fixed, max_examples=30, stateful_step_count=20))
