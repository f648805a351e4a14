"""The features that are combined, each as `TapeModel` has it and as the reference has it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, backward, callbacks, hooks

from . import reference
from .reference import Loss, Term, Training
from .support import scope

Row = dict[str, str]
BATCH_SIZE = 6
register = keras.saving.register_keras_serializable("tests_reference")

# --- Losses

LOSSES = {
    "mean": Loss(),
    "sum": Loss((Term(reduction="sum", weight=0.05),)),
    "mean by weight": Loss((Term(reduction="mean_with_sample_weight"),)),
    "masked": Loss((Term(masked=True),)),
    "ignore_class": Loss((Term(error="labels"),)),
    "two heads": Loss((Term("a"), Term("b", weight=0.7))),
    "unlike heads": Loss((Term("a", error="labels"), Term("b", reduction="sum", weight=0.05))),
    "add_loss": Loss(activity=0.3),
    "regularizer": Loss(regularizer=0.1),
    "own loss": Loss(),
    "custom step": Loss(),
    "two updates": Loss(separate=True),
}


def _compiled(term: Term) -> Any:
    if term.error == "labels":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    reduction = {"mean": "sum_over_batch_size"}.get(term.reduction, term.reduction)
    return keras.losses.MeanSquaredError(reduction=reduction)


def _mean(y: Any, y_pred: Any, weights: Any) -> Any:
    """What the steps and losses of the user's own minimize."""
    if isinstance(y, dict):
        y, y_pred = y["end"], y_pred["end"]
    y_pred = tf.cast(y_pred, keras.config.floatx())
    errors = tf.reduce_mean(tf.square(tf.cast(y, y_pred.dtype) - y_pred), axis=-1)
    if isinstance(weights, dict):
        weights = weights["end"]
    if weights is not None:
        errors *= tf.cast(weights, errors.dtype)
    return tf.reduce_mean(errors)


class OwnLoss:
    """A loss of the user's own."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return _mean(y, y_pred, sample_weight)


class CustomStep:
    """A step of the user's own."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with self.gradient_tape() as tape:
            loss = _mean(y, self(x, training=True), sample_weight)
        tape.minimize(loss)
        return {"loss": loss}


class TwoUpdates:
    """The output's weights have an update of their own, before the others have theirs."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with self.gradient_tape(persistent=True) as tape:
            loss = _mean(y, self(x, training=True), sample_weight)
        for last in (True, False):
            chosen = [v for v in self.trainable_variables if (key(v)[:4] == "end/") == last]
            if chosen:
                tape.minimize(loss, chosen)
        return {"loss": loss}


MIXINS = {"own loss": OwnLoss, "custom step": CustomStep, "two updates": TwoUpdates}


@functools.cache
def _kind(base: Any, loss: str) -> Any:
    """A class of models with the steps that a loss takes."""
    if loss not in MIXINS:
        return base
    mixin = MIXINS[loss]
    return register(type(f"{mixin.__name__}{base.__name__}", (mixin, base), {}))


# --- Models


@register
class Activity(layers.Layer):
    """Adds a loss."""

    def call(self, inputs):
        squares = tf.cast(tf.square(inputs), keras.config.floatx())
        self.add_loss(0.3 * tf.reduce_mean(squares))
        return inputs


@register
class Scale(layers.Layer):
    """Has a weight of shape `()`."""

    def build(self, input_shape):
        self.supports_masking = True
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs):
        return inputs * self.scale


@register
class Net(TapeModel):
    """The model as a subclass, bare variable or not."""

    def __init__(self, loss, bare=False, pooled=False, **kwargs):
        super().__init__(**kwargs)
        self.loss_name = loss
        self.has_bare = bare
        self.pooled = pooled
        self.front, self.hidden, self.after, self.heads = _layers(loss, pooled)
        self.head_names = [head.name for head in self.heads]
        if bare:
            self.bare = tf.Variable([1.0, 0.7, 1.3, 0.9], name="bare", dtype=keras.config.floatx())

    def call(self, x):
        h = x
        for layer in [*self.front, self.hidden]:
            h = layer(h)
        if self.has_bare:
            h = h * tf.cast(self.bare, h.dtype)
        for layer in self.after:
            h = layer(h)
        found = {name: head(h) for name, head in zip(self.head_names, self.heads, strict=True)}
        return found if len(found) > 1 else found["end"]

    def get_config(self):
        own = {"loss": self.loss_name, "bare": self.has_bare, "pooled": self.pooled}
        return {**super().get_config(), **own}


def _layers(loss: str, pooled: bool) -> Any:
    """The layers before the hidden one, that one, those after it, and the outputs."""
    what = LOSSES[loss]
    regularizer = keras.regularizers.L2(what.regularizer) if what.regularizer else None
    front = [layers.Masking(name="mask")] if what.terms[0].masked else []
    hidden = layers.Dense(4, activation="tanh", kernel_regularizer=regularizer, name="hidden")
    after = [Activity(name="activity")] if what.activity else []
    after += [layers.GlobalAveragePooling1D(name="pool")] if pooled else []
    heads = [layers.Dense(2, name=term.head) for term in what.terms]
    return front, hidden, after, heads


def _functional(loss: str, model: str, pooled: bool) -> Any:
    front, hidden, after, heads = _layers(loss, pooled)
    inputs = keras.Input((3, 4), name="x")
    if model == "embedding":
        inputs = keras.Input((3,), dtype="int32", name="x")
        masked = LOSSES[loss].terms[0].masked
        front = [layers.Embedding(5, 4, mask_zero=masked, name="table")]
    chain = [*front, hidden]
    if model == "shared layer":
        chain.append(hidden)
    if model == "scalar weight":
        chain.append(Scale(name="scale"))
    h = inputs
    if model == "nested":
        inner_inputs = h = keras.Input((3, 4))
        for layer in chain:
            h = layer(h)
        h = keras.Model(inner_inputs, h, name="inner")(inputs)
        chain = []
    for layer in [*chain, *after]:
        h = layer(h)
    found = {head.name: head(h) for head in heads}
    return _kind(TapeModel, loss)(
        inputs, found if len(found) > 1 or model == "dict outputs" else found["end"]
    )


def build(row: Row) -> Any:
    """Makes the model of a row."""
    kind, loss, pooled = row["model"], row["loss"], row["weights"] == "class"
    if kind.startswith("sequential"):
        front, hidden, after, heads = _layers(loss, pooled)
        first = [keras.Input((3, 4))] if kind == "sequential" else []
        return _kind(TapeSequential, loss)([*first, *front, hidden, *after, *heads])
    if kind.startswith("subclass") or kind == "bare variables":
        model = _kind(Net, loss)(loss, kind == "bare variables", pooled)
        if kind == "subclass":
            model(np.zeros((1, 3, 4), "float32"))
        return model
    return _functional(loss, kind, pooled)


MODELS = [
    "functional",
    "sequential",
    "sequential, unbuilt",
    "subclass",
    "subclass, unbuilt",
    "dict outputs",
    "nested",
    "bare variables",
    "shared layer",
    "scalar weight",
    "embedding",
]


def key(variable: Any) -> str:
    """Returns the name that the reference has for a variable."""
    parts = variable.path.split("/")
    return "bare" if "bare" in parts[-1] else "/".join(parts[-2:])


# --- Data

NUM_EXAMPLES = {
    "even": 24,
    "uneven": 22,
    "one left over": 19,
    "unknown length": 22,
    "generator": 22,
    "one batch": 6,
}
RNG = np.random.default_rng(17)
LENGTHS = np.array([3, 1, 2, 3, 1, 1, 3, 3, 3, 1, 2, 1] * 2)
TOKENS = np.where(np.arange(3) < LENGTHS[:, None], RNG.integers(1, 5, (24, 3)), 0).astype("int32")
TABLE = np.concatenate([np.zeros((1, 4)), RNG.normal(size=(4, 4))])
Y = RNG.normal(size=(2, 24, 3, 2))
LABELS = np.where(TOKENS > 0, RNG.integers(0, 2, (24, 3)), -1).astype("int32")
WEIGHTS = RNG.uniform(0.2, 2.0, size=(24, 3)) * np.array([1, 0, 3, 1] * 6)[:, None]
CLASS_WEIGHT = {0: 1.5, 1: 0.4}
BAD = 9


def arrays(row: Row) -> dict[str, np.ndarray]:
    """Returns the data of a row as the reference takes them."""
    dtype = "float64" if row["dtype"] == "float64" else "float32"
    n = NUM_EXAMPLES[row["data"]]
    by_token = row["model"] == "embedding"
    found = {"tokens": TOKENS[:n], "x": TOKENS[:n] if by_token else TABLE[TOKENS[:n]].astype(dtype)}
    for i, term in enumerate(LOSSES[row["loss"]].terms):
        y = LABELS if term.error == "labels" else Y[i].astype(dtype)
        found[f"y/{term.head}"] = y[:n].copy()
        if row["weights"] == "sample":
            weights = WEIGHTS if i == 0 else WEIGHTS[::-1]
            found[f"weight/{term.head}"] = weights[:n].astype(dtype)
        if row["weights"] == "class":
            # Of a whole sequence: of one time.
            found[f"y/{term.head}"] = y[:n, :1].copy()
            is_first = Y[i][:n, 0].argmax(-1) == 0
            found[f"weight/{term.head}"] = np.where(is_first, CLASS_WEIGHT[0], CLASS_WEIGHT[1])
    if row["hook"] == "gate" and n > BAD:
        place = "x" if not by_token else f"y/{LOSSES[row['loss']].terms[-1].head}"
        if found[place].dtype.kind == "f":
            found[place][BAD, 0, 0] = np.nan
    return found


def batches(row: Row) -> list[dict[str, np.ndarray]]:
    """Returns the batches of an epoch, in float64."""
    found = arrays(row)
    wide = {k: v.astype("float64") if v.dtype.kind == "f" else v for k, v in found.items()}
    n = len(wide["x"])
    return [{k: v[i : i + BATCH_SIZE] for k, v in wide.items()} for i in range(0, n, BATCH_SIZE)]


def _nested(row: Row) -> tuple[Any, ...]:
    """Returns `x`, `y` and, where there are, weights of examples, as Keras takes them."""
    found = arrays(row)
    heads = [term.head for term in LOSSES[row["loss"]].terms]
    y = {head: found[f"y/{head}"] for head in heads}
    weights = {h: found[f"weight/{h}"] for h in heads} if row["weights"] == "sample" else None
    if len(heads) == 1 and row["model"] != "dict outputs":
        y, weights = y["end"], weights and weights["end"]
    if row["weights"] == "class":
        y = y[:, 0]
    return (found["x"], y) if weights is None else (found["x"], y, weights)


class Generator(keras.utils.PyDataset):
    """The batches one by one."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data

    def __len__(self) -> int:
        return -(-len(self.data[0]) // BATCH_SIZE)

    def __getitem__(self, i: int) -> Any:
        rows = slice(i * BATCH_SIZE, (i + 1) * BATCH_SIZE)
        return keras.tree.map_structure(lambda v: v[rows], self.data)


def feed(row: Row) -> dict[str, Any]:
    """Returns the arguments of `fit` for the data of a row."""
    data = _nested(row)
    more = {"class_weight": CLASS_WEIGHT} if row["weights"] == "class" else {}
    if row["data"] == "generator":
        return {"x": Generator(data), "shuffle": False, **more}
    if row["data"] == "unknown length":
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(BATCH_SIZE)
        return {"x": dataset.filter(lambda *batch: True), "shuffle": False, **more}
    names = ("x", "y", "sample_weight")
    return {
        **dict(zip(names, data, strict=False)),
        "batch_size": BATCH_SIZE,
        "shuffle": False,
        **more,
    }


# --- Optimizers: as the reference has them, and put together

FACTORIES = {
    "SGD": lambda **o: keras.optimizers.SGD(0.1, momentum=0.9, **o),
    "schedule": lambda **o: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.2, 2, 0.5), **o
    ),
    # Large, so that what is tiny is not blown up.
    "Adam": lambda **o: keras.optimizers.Adam(0.02, epsilon=1e-2, **o),
    "AdamW EMA": lambda **o: keras.optimizers.AdamW(0.02, weight_decay=0.1, epsilon=1e-2, **o),
    "RMSprop": lambda **o: keras.optimizers.RMSprop(0.02, momentum=0.5, epsilon=1e-2, **o),
    "Muon": lambda **o: keras.optimizers.Muon(0.02, **o),
}
OPTIMIZERS = [*FACTORIES, "MultiOptimizer", "loss scale"]
EMA = 0.9


def optimizer_of(row: Row) -> Any:
    """Makes the optimizer of a row."""
    steps = WINDOWS[row["parts"]]
    options = {"gradient_accumulation_steps": steps} if steps > 1 else {}
    name = row["optimizer"]
    if name == "MultiOptimizer":
        module = pytest.importorskip("keras.src.optimizers.multi_optimizer")
        by_pattern = {".*hidden.*": FACTORIES["Adam"](**options)}
        made = module.MultiOptimizer(module.OptimizerMap(FACTORIES["SGD"](**options), by_pattern))
    elif name == "AdamW EMA":
        made = FACTORIES[name](use_ema=True, ema_momentum=EMA, **options)
    else:
        made = FACTORIES["SGD" if name == "loss scale" else name](**options)
    if name == "loss scale" or row["dtype"] == "mixed_float16":
        made = keras.optimizers.LossScaleOptimizer(made, initial_scale=2.0**8)
    return made


# --- Modes, parts, hooks, freezing

MODES: dict[str, tuple[dict[str, Any], int | None]] = {
    "graph": ({"jit_compile": False}, None),
    "eager": ({"run_eagerly": True}, None),
    "XLA": ({"jit_compile": True}, None),
    "update in XLA": ({"jit_compile": "update"}, None),
    "3 steps per execution": ({"steps_per_execution": 3, "jit_compile": False}, None),
    "1 replica": ({}, 1),
    "2 replicas": ({}, 2),
    "3 replicas": ({}, 3),
}
# The number of steps that are one update.
WINDOWS = {
    "whole": 1,
    "micro-batches": 1,
    "accumulated": 2,
    "leftovers": 3,
    "micro-batches, accumulated": 2,
}


@register
def grow(gradient: Any, variable: Any) -> Any:
    """As `reference.grow`."""
    return gradient * (1.0 + 0.3 * tf.norm(gradient))


@register
def leave(gradient: Any, variable: Any) -> None:
    """Leaves a gradient as it is."""


HOOKS: dict[str, tuple[Any, Any]] = {
    "none": (lambda: [], []),
    "function": (lambda: [grow], [reference.grow]),
    "global norm": (lambda: [hooks.GlobalNormClipping(0.3)], [reference.clip_global]),
    "norm": (lambda: [hooks.NormClipping(0.1)], [reference.clip_each]),
    "percentile": (
        lambda: [hooks.PercentileClipping(30, history=4)],
        [reference.clip_percentile],
    ),
    "centralization": (
        lambda: [hooks.Centralization(), grow],
        [reference.centralize, reference.grow],
    ),
    "gate": (lambda: [hooks.SkipNonFinite(), grow], [reference.grow]),
    "learning rate": (lambda: [hooks.LearningRateMultiplier(0.3, "*hidden/*")], []),
    "monitor": (lambda: [hooks.GradientMonitor(), grow], [reference.grow]),
    "sharpness": (lambda: [], []),
}
FREEZING = ["none", "layer", "variable", "alternating", "scheduled"]
BREAKS = ["none", "keras file", "weights", "pickle", "resumed", "mid-epoch"]
DTYPES = ["float32", "float64", "mixed_float16"]

DIMENSIONS: dict[str, list[str]] = {
    "model": MODELS,
    "loss": list(LOSSES),
    "weights": ["none", "sample", "class"],
    "data": list(NUM_EXAMPLES),
    "optimizer": OPTIMIZERS,
    "mode": list(MODES),
    "parts": list(WINDOWS),
    "hook": list(HOOKS),
    "freezing": FREEZING,
    "break": BREAKS,
    "dtype": DTYPES,
}


class Freeze(keras.callbacks.Callback):
    """Freezes by hand, between epochs."""

    def __init__(self, row: Row, again: bool) -> None:
        super().__init__()
        self.row = row
        self.again = again

    def on_epoch_begin(self, epoch, logs=None):
        if self.row["freezing"] == "alternating":
            is_hidden = lambda v: key(v).startswith("hidden/")  # noqa: E731
            self.model.unfreeze("*")
            self.model.freeze(
                "*hidden/*" if epoch % 2 == 0 else lambda v: v.trainable and not is_hidden(v)
            )
        elif self.row["freezing"] == "variable" and (epoch == 0 or self.again):
            self.model.freeze("*/bias")


def frozen(row: Row, names: list[str], epoch: int) -> list[str]:
    """Returns what is frozen in an epoch."""
    kind = row["freezing"]
    of_hidden = [n for n in names if n.startswith("hidden/")]
    if kind == "variable":
        return [n for n in names if n.endswith("/bias")]
    if kind == "layer" or (kind == "scheduled" and epoch == 0):
        return of_hidden
    if kind == "alternating":
        return of_hidden if epoch % 2 == 0 else [n for n in names if n not in of_hidden]
    return []


# --- Both trainings of a row


@contextlib.contextmanager
def precision(row: Row) -> Iterator[None]:
    """Keras's float types while the model of a row is used."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64" if row["dtype"] == "float64" else "float32")
    keras.config.set_dtype_policy(row["dtype"])
    try:
        yield
    finally:
        keras.config.set_floatx(before[1])
        keras.config.set_dtype_policy(before[0])


@dataclasses.dataclass
class Found:
    """What the library made of a row; as `reference.Result`."""

    weights: dict[str, np.ndarray]
    logs: dict[str, list[float]]
    records: dict[str, np.ndarray]
    updates: int


def make(row: Row, seed: int = 5) -> Any:
    """Makes and compiles the model of a row, to be called in the scope of its strategy."""
    keras.utils.set_random_seed(seed)
    model = build(row)
    options, _ = MODES[row["mode"]]
    terms = LOSSES[row["loss"]].terms
    loss: Any = {term.head: _compiled(term) for term in terms}
    loss_weights: Any = {term.head: term.weight for term in terms}
    if len(terms) == 1 and row["model"] != "dict outputs":
        loss, loss_weights = loss["end"], loss_weights["end"]
    if row["loss"] in MIXINS:
        loss = loss_weights = None
    chosen = HOOKS[row["hook"]][0]()
    if row["model"] == "embedding" and not chosen:
        # Without a hook it is Keras to the bit: Adam takes repeated rows one by one there.
        chosen = [leave]
    if row["freezing"] == "scheduled":
        chosen.insert(0, hooks.Freezing("*hidden/*", epochs=1))
    more: dict[str, Any] = {}
    if row["parts"].startswith("micro-batches"):
        more["micro_batches"] = 2
    if row["hook"] == "sharpness":
        more["backward"] = backward.SharpnessAware(0.3, synchronize=True)
    if row["freezing"] == "layer":
        _hidden_layer(model).trainable = False
    model.compile(
        optimizer_of(row),
        loss,
        loss_weights=loss_weights,
        gradient_hooks=chosen,
        **more,
        **options,
    )
    return model


def _hidden_layer(model: Any) -> Any:
    every = itertools.chain(model.layers, *(getattr(layer, "layers", []) for layer in model.layers))
    return next(layer for layer in every if layer.name == "hidden")


class Killed(Exception):
    """The process ends here."""


class Kill(keras.callbacks.Callback):
    """Ends the training in the second epoch, after its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1:
            raise Killed


def start(row: Row) -> dict[str, np.ndarray]:
    """Returns the weights that the training of a row begins with."""
    with precision(row):
        keras.utils.set_random_seed(5)
        model = build(row)
        model(arrays(row)["x"][:1])
        return {key(v): _numpy(v) for v in _weights(model)}


def _weights(model: Any) -> list[Any]:
    return [v for v in model.variables if "seed" not in v.path]


def _numpy(variable: Any) -> np.ndarray:
    return np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)


def found(row: Row, folder: pathlib.Path, given: dict[str, np.ndarray]) -> Found:
    """Trains the model of a row.

    Args:
        row: its features.
        folder: for files.
        given: the weights to begin with.
    """
    _, num_replicas = MODES[row["mode"]]
    with precision(row), scope(num_replicas):
        model = make(row)
        _assign(model, row, given)
        if row["break"] == "mid-epoch":
            return _by_hand(row, model, folder)
        logs: dict[str, list[float]] = {}
        chunks = []
        for first, last, more in _fits(row, folder):
            history = callbacks.GradientHistory()
            every = [history, Freeze(row, row["break"] not in ("keras file", "pickle")), *more]
            try:
                fitted = model.fit(
                    **feed(row), initial_epoch=first, epochs=last, verbose=0, callbacks=every
                )
                for name, values in fitted.history.items():
                    logs.setdefault(name, []).extend(values)
            except Killed:
                # The epoch before is in the backup only.
                for name, values in model.history.history.items():
                    logs.setdefault(name, []).extend(values)
            chunks.append(history.to_numpy())
            if last < 2 or more:
                model = _again(row, model, folder) if (last, len(more)) != (2, 1) else model
        records = {} if row["break"] == "resumed" else _joined(chunks)
        return _result(model, logs, records)


def _fits(row: Row, folder: pathlib.Path) -> list[tuple[int, int, list[Any]]]:
    """First epoch, last epoch, more callbacks: of each call of `fit`."""
    if row["break"] == "none":
        return [(0, 2, [])]
    if row["break"] == "resumed":
        backup = lambda: keras.callbacks.BackupAndRestore(folder / "backup")  # noqa: E731
        return [(0, 2, [backup(), Kill()]), (0, 2, [backup()])]
    return [(0, 1, []), (1, 2, [])]


def _again(row: Row, model: Any, folder: pathlib.Path) -> Any:
    """Returns the model as it is found again after a break."""
    how = row["break"]
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    if how == "keras file" or how == "mid-epoch":
        model.save(folder / "model.keras")
        return keras.models.load_model(folder / "model.keras")
    other = make(row, seed=6)
    if how == "weights":
        model.save_weights(folder / "model.weights.h5")
        # Built, and trained a little: nothing of that may be left.
        other.fit(**feed(row), epochs=1, verbose=0)
        other.load_weights(folder / "model.weights.h5")
    return other


def _by_hand(row: Row, model: Any, folder: pathlib.Path) -> Found:
    """Batch by batch, with a break after the third one: no epoch ends anywhere."""
    data = _nested(row)
    class_weight = CLASS_WEIGHT if row["weights"] == "class" else None
    steps = [*range(0, NUM_EXAMPLES[row["data"]], BATCH_SIZE)] * 2
    if row["freezing"] == "variable":
        model.freeze("*/bias")
    for number, i in enumerate(steps):
        if number == min(3, len(steps) - 1):
            model = _again(row, model, folder)
        part = keras.tree.map_structure(lambda v, i=i: v[i : i + BATCH_SIZE], data)
        model.train_on_batch(*part, class_weight=class_weight)
    return _result(model, {}, {})


def _assign(model: Any, row: Row, given: dict[str, np.ndarray]) -> None:
    """Has a model begin with given weights, where it is built; else its seed is theirs."""
    for variable in _weights(model) if model.built else []:
        variable.assign(given[key(variable)])


def _result(model: Any, logs: dict[str, list[float]], records: Any) -> Found:
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    leaves = getattr(inner, "optimizers", None) or [inner]
    weights = {key(v): _numpy(v) for v in _weights(model)}
    return Found(weights, logs, records, max(int(o.iterations.numpy()) for o in leaves))


def _joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = ("loss", "gradient_norm", "gradient_norm_after", "skipped")
    return {name: np.concatenate([c[name] for c in chunks]) for name in names}


def expected(row: Row, given: dict[str, np.ndarray]) -> reference.Result:
    """Returns what is right for a row."""
    name = row["optimizer"]
    factories = {
        "MultiOptimizer": [("hidden", FACTORIES["Adam"]), ("", FACTORIES["SGD"])],
        "loss scale": [("", FACTORIES["SGD"])],
    }.get(name) or [("", FACTORIES[name])]
    kind = {"sequential": "functional", "subclass": "functional"}.get(
        row["model"].split(",")[0], row["model"]
    )
    epochs = [batches(row)] * 2
    ends: tuple[int, ...] = (0, 1) if row["break"] in ("keras file", "weights", "pickle") else (1,)
    if row["break"] == "mid-epoch":
        epochs, ends = [[*epochs[0], *epochs[1]]], ()
    training = Training(
        model=kind,
        loss=LOSSES[row["loss"]],
        optimizers=factories,
        epochs=epochs,
        window=WINDOWS[row["parts"]],
        hooks=HOOKS[row["hook"]][1],
        gate=row["hook"] == "gate",
        rates={"hidden/": 0.3} if row["hook"] == "learning rate" else {},
        uphill=0.3 if row["hook"] == "sharpness" else 0.0,
        frozen=lambda epoch: frozen(row, list(given), epoch),
        ema=EMA if name == "AdamW EMA" else None,
        ends=ends,
        leftovers=row["break"] != "mid-epoch",
        pooled=row["weights"] == "class",
        # Keras's Muon has a factor in float32.
        dtype="float32" if name == "Muon" else "float64",
    )
    return reference.run(training, given)
