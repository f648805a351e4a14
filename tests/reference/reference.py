"""What training is, written out slowly, to be checked by eye.

One plain loop in float64 over whole batches. Forward passes are formulas on a dictionary of
weights, the loss is `sum_k w_k * N_k / D_k + R`, hooks are NumPy functions, and Keras is
asked for nothing but the update of an optimizer. Nothing of the library is imported.

What the loop says:

- A window of accumulated steps is one update on the union of its batches; what is left over
  at the end of an epoch is a window too.
- A step whose gradients a gate rejects never happened: it counts in no window, no log, no
  state, and not among the updates.
- What is frozen is absent: value and slots stay, no norm has a share of it.
- Hooks see the gradient of the mean over the whole batch, or window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Arrays = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

# --- Models: from weights and inputs to the hidden layer and the outputs


def hidden(model: str, w: dict[str, Any], x: Any) -> Any:
    """The layer before the outputs, `[examples, times, units]`."""
    if model == "embedding":
        x = tf.gather(w["table/embeddings"], x)
    h = tf.tanh(x @ w["hidden/kernel"] + w["hidden/bias"])
    if model == "shared layer":
        h = tf.tanh(h @ w["hidden/kernel"] + w["hidden/bias"])
    if model == "scalar weight":
        h = h * w["scale/scale"]
    if model == "bare variables":
        h = h * w["bare"]
    return h


def outputs(t: Training, w: dict[str, Any], x: Any) -> dict[str, Any]:
    """The outputs by their layers' names, `[examples, times, 2]`."""
    h = hidden(t.model, w, x)
    if t.pooled:
        h = tf.reduce_mean(h, axis=1, keepdims=True)
    heads = [term.head for term in t.loss.terms]
    return {name: h @ w[f"{name}/kernel"] + w[f"{name}/bias"] for name in heads}


# --- Losses: a list of terms `(w_k, N_k, D_k)`, and `R`


@dataclass(frozen=True)
class Term:
    """One compiled loss.

    Args:
        head: the output that it is of.
        error: `"squares"`, or `"labels"` for the cross entropy of integer labels, where
            -1 stands for none.
        reduction: `"mean"`, `"sum"` or `"mean_with_sample_weight"`.
        masked: whether the output has a mask: false where a token is 0.
        weight: `w_k`.
    """

    head: str = "end"
    error: str = "squares"
    reduction: str = "mean"
    masked: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """All that is minimized.

    Args:
        terms: the compiled losses.
        regularizer: the factor of the squares of the hidden kernel.
        activity: the factor of the mean square of the hidden layer.
        separate: whether the weights of the outputs have an update of their own, before
            that of all others.
    """

    terms: tuple[Term, ...] = (Term(),)
    regularizer: float = 0.0
    activity: float = 0.0
    separate: bool = False


def sums(term: Term, batch: Batch, y_pred: Any) -> tuple[Any, Any]:
    """Returns `N` and `D` of a term: what is summed up, and what that is divided by."""
    y = batch[f"y/{term.head}"]
    if term.error == "labels":
        kept = y >= 0
        odds = tf.nn.log_softmax(y_pred)
        losses = -tf.gather(odds, np.maximum(y, 0), batch_dims=2)
    else:
        kept = batch["tokens"] != 0 if term.masked else np.ones(y.shape[:2], bool)
        losses = tf.reduce_mean(tf.square(y - y_pred), axis=-1)
    weights = batch.get(f"weight/{term.head}", np.ones(len(y)))
    weights = weights if weights.ndim == 2 else weights[:, None]
    weights = np.broadcast_to(weights, kept.shape)
    total = tf.reduce_sum(tf.where(kept, losses * weights, 0.0))
    divisors = {
        "mean": kept.sum(),
        "sum": 1.0,
        "mean_with_sample_weight": weights[kept].sum(),
    }
    return total, float(divisors[term.reduction])


def loss_of(t: Training, w: dict[str, Any], batch: Batch, active: set[str]) -> tuple[Any, Any]:
    """Returns the loss, and each term's own mean by the name of its output."""
    y_pred = outputs(t, w, batch["x"])
    total, own = tf.constant(0.0, tf.float64), {}
    for term in t.loss.terms:
        n, d = sums(term, batch, y_pred[term.head])
        own[term.head] = n / d if d else n * 0.0
        total += term.weight * own[term.head]
    # Keras counts the regularizers of what is trained.
    if t.loss.regularizer and "hidden/kernel" in active:
        total += t.loss.regularizer * tf.reduce_sum(tf.square(w["hidden/kernel"]))
    if t.loss.activity:
        h = hidden(t.model, w, batch["x"])
        total += t.loss.activity * tf.reduce_mean(tf.square(h))
    return total, own


# --- Hooks: from gradients to gradients


def norm(gradients: Arrays) -> float:
    """The global norm."""
    return float(np.sqrt(sum(np.square(g).sum() for g in gradients.values())))


def grow(gradients: Arrays, state: dict[str, Any]) -> Arrays:
    """A function of a gradient that depends on its size."""
    return {k: g * (1.0 + 0.3 * np.linalg.norm(g)) for k, g in gradients.items()}


def clip_global(gradients: Arrays, state: dict[str, Any], max_norm: float = 0.3) -> Arrays:
    """GlobalNormClipping."""
    factor = max_norm / max(norm(gradients), max_norm)
    return {k: g * factor for k, g in gradients.items()}


def clip_each(gradients: Arrays, state: dict[str, Any], max_norm: float = 0.1) -> Arrays:
    """NormClipping."""
    return {k: g * max_norm / max(np.linalg.norm(g), max_norm) for k, g in gradients.items()}


def clip_percentile(gradients: Arrays, state: dict[str, Any]) -> Arrays:
    """PercentileClipping: the 30th percentile of the last four norms."""
    state["norms"] = [*state.get("norms", []), norm(gradients)][-4:]
    bound = np.percentile(state["norms"], 30)
    return {k: g * min(1.0, bound / norm(gradients)) for k, g in gradients.items()}


def centralize(gradients: Arrays, state: dict[str, Any]) -> Arrays:
    """Centralization: of kernels, over the inputs of each unit; no embedding is one."""
    return {
        k: g - g.mean(axis=0, keepdims=True) if k.endswith("/kernel") else g
        for k, g in gradients.items()
    }


# --- The description of a training


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        model: a kind that `hidden` knows.
        loss: what is minimized.
        optimizers: pairs of the start of a weight's name and what makes its optimizer;
            the first that fits.
        epochs: of each, the batches. Each has `x`, `tokens`, `y/<head>`, and where there
            are weights `weight/<head>`.
        window: the number of steps of an update.
        hooks: functions of gradients and a state that they may keep.
        gate: whether a step whose gradients are not finite is rejected.
        rates: factors of learning rates, by the start of a weight's name.
        uphill: `rho` of SharpnessAware, or 0.
        frozen: of an epoch, the weights that are not trained.
        ema: the momentum of moving averages that stand in for the weights after each
            `fit`, or `None`.
        ends: the epochs after which a `fit` ends.
        leftovers: whether an epoch's end ends a window.
        pooled: whether outputs are of the mean over times: of one time.
        dtype: of the weights; gradients are float64.
    """

    model: str
    loss: Loss
    optimizers: Sequence[tuple[str, Callable[[], Any]]]
    epochs: Sequence[Sequence[Batch]]
    window: int = 1
    hooks: Sequence[Callable[[Arrays, dict[str, Any]], Arrays]] = ()
    gate: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    uphill: float = 0.0
    frozen: Callable[[int], Sequence[str]] = lambda epoch: ()
    ema: float | None = None
    ends: Sequence[int] = ()
    leftovers: bool = True
    pooled: bool = False
    dtype: str = "float64"


@dataclass
class Result:
    """What is right.

    Args:
        weights: by name, after the training.
        logs: of each epoch.
        records: of each step, a rejected one too: `loss`, `gradient_norm` before the hooks,
            `skipped`, and `after`, the norm behind the hooks, NaN but where an update was.
        updates: the number of updates of each optimizer.
        by_updates: logs of each output's own loss where every update counts alike. That is
            what Keras logs from a graph, which does not know the size of a batch.
    """

    weights: Arrays
    logs: dict[str, list[float]]
    records: list[dict[str, float]]
    updates: list[int]
    by_updates: dict[str, list[float]]


# --- The loop


def run(t: Training, start: Arrays) -> Result:
    """Makes a training from the weights that it starts with."""
    loop = Loop(t, start)
    for epoch, batches in enumerate(t.epochs):
        loop.epoch(epoch, batches)
        if epoch in t.ends and t.ema is not None:
            loop.take_averages(epoch)
    weights = {name: v.numpy() for name, v in loop.variables.items()}
    updates = [int(o.iterations.numpy()) for o in loop.optimizers]
    return Result(weights, loop.logs, loop.records, updates, loop.by_updates)


class Loop:
    """A training that is made epoch by epoch, and may be changed between two of them."""

    def __init__(self, t: Training, start: Arrays) -> None:
        self.t = t
        self.variables = {
            name: keras.Variable(w, dtype=t.dtype, name=name.split("/")[-1])
            for name, w in start.items()
        }
        self.make_optimizers()
        self.averages = {name: v.numpy() for name, v in self.variables.items()}
        self.states: dict[int, dict[str, Any]] = {id(hook): {} for hook in t.hooks}
        self.logs: dict[str, list[float]] = {}
        self.by_updates: dict[str, list[float]] = {}
        self.records: list[dict[str, float]] = []
        self.window: list[Batch] = []

    def make_optimizers(self) -> None:
        """Makes optimizers that know nothing yet."""
        made = self.t.optimizers
        self.optimizers = [make() for _, make in made]
        self.owner = {
            name: next(i for i, (prefix, _) in enumerate(made) if name.startswith(prefix))
            for name in self.variables
        }
        for i, optimizer in enumerate(self.optimizers):
            optimizer.build([v for name, v in self.variables.items() if self.owner[name] == i])

    def change(self, **changes: Any) -> None:
        """Goes on with other arguments of `Training`.

        Hooks that stay keep their state. With another optimizer another window begins.
        """
        self.t = replace(self.t, **changes)
        self.states = {id(hook): self.states.get(id(hook), {}) for hook in self.t.hooks}
        if "optimizers" in changes:
            self.window = []
            self.make_optimizers()

    def epoch(self, epoch: int, batches: Sequence[Batch]) -> None:
        """Makes the steps of an epoch, and writes its logs."""
        active = set(self.variables) - set(self.t.frozen(epoch))
        self.entries: list[tuple[int, dict[str, float]]] = []
        self.norms: list[float] = []
        skipped = 0
        for batch in batches:
            gradients, loss, own = self.gradients(batch, active)
            bad = self.t.gate and not np.isfinite(norm(gradients))
            record = {"loss": loss, "gradient_norm": norm(gradients), "skipped": bad}
            self.records.append({**record, "after": np.nan})
            skipped += bad
            if not bad:
                self.window.append(batch)
                # Each step logs the loss of its own batch, while gradients accumulate too.
                terms = own if len(own) > 1 else {}
                self.entries.append((len(batch["x"]), {"loss": loss, **terms}))
            if len(self.window) == self.t.window:
                self.update(active)
        if self.window and self.t.leftovers:
            self.update(active)
        examples = sum(n for n, _ in self.entries)
        names = self.entries[0][1] if self.entries else {}
        entry = {k: sum(n * e[k] for n, e in self.entries) / examples for k in names}
        for name in names:
            mean = float(np.mean([e[name] for _, e in self.entries]))
            self.by_updates.setdefault(name, []).append(mean)
        entry["gradient_norm"] = float(np.mean(self.norms)) if self.norms else np.nan
        entry["skipped_steps"] = skipped
        for name, value in entry.items():
            self.logs.setdefault(name, []).append(value)

    def gradients(self, batch: Batch, active: set[str]) -> tuple[Arrays, float, dict[str, float]]:
        """Returns the gradients of the loss on a batch, the loss, and its terms."""
        w = {name: tf.constant(v.numpy(), tf.float64) for name, v in self.variables.items()}
        gradients, loss, own = self.gradients_at(w, batch, active)
        if self.t.uphill:
            factor = self.t.uphill / norm(gradients)
            w = {k: v + factor * gradients[k] if k in gradients else v for k, v in w.items()}
            gradients, _, _ = self.gradients_at(w, batch, active)
        return gradients, loss, own

    def gradients_at(self, w: dict[str, Any], batch: Batch, active: set[str]) -> Any:
        """The same at other weights."""
        trained = {name: w[name] for name in self.variables if name in active}
        with tf.GradientTape() as tape:
            tape.watch(trained)
            loss, own = loss_of(self.t, w, batch, active)
        found = tape.gradient(loss, trained)
        gradients = {k: tf.convert_to_tensor(g).numpy() for k, g in found.items() if g is not None}
        return gradients, float(loss), {f"{k}_loss": float(v) for k, v in own.items()}

    def update(self, active: set[str]) -> None:
        """Makes one update of the union of the batches in the window."""
        union = {k: np.concatenate([b[k] for b in self.window]) for k in self.window[0]}
        self.window = []
        gradients, _, _ = self.gradients(union, active)
        groups = [gradients]
        if self.t.loss.separate:
            last = {k: g for k, g in gradients.items() if k.startswith("end/")}
            groups = [last, {k: g for k, g in gradients.items() if k not in last}]
        square = 0.0
        for group in (g for g in groups if g):
            self.norms.append(norm(group))
            for hook in self.t.hooks:
                group = hook(group, self.states[id(hook)])
            square += norm(group) ** 2
            self.apply(group)
        self.records[-1]["after"] = np.sqrt(square)

    def apply(self, gradients: Arrays) -> None:
        """Has each optimizer update its weights."""
        before = {name: self.variables[name].numpy() for name in gradients}
        for i, optimizer in enumerate(self.optimizers):
            names = [name for name in gradients if self.owner[name] == i]
            if names:
                values = [tf.constant(gradients[name], self.t.dtype) for name in names]
                optimizer.apply(values, [self.variables[name] for name in names])
        first = self.optimizers[0].iterations.numpy() == 1
        for name, old in before.items():
            variable = self.variables[name]
            rate = [r for prefix, r in self.t.rates.items() if name.startswith(prefix)]
            if rate:
                variable.assign(old + rate[0] * (variable.numpy() - old))
            if self.t.ema is not None:
                momentum = 0.0 if first else self.t.ema
                new = momentum * self.averages[name] + (1.0 - momentum) * variable.numpy()
                self.averages[name] = new

    def take_averages(self, epoch: int) -> None:
        """What `fit` does at its end."""
        for name, variable in self.variables.items():
            if name not in self.t.frozen(epoch):
                variable.assign(self.averages[name])
