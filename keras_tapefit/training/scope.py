"""One training step from its first line to its logs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.hooks.step import Report
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.update import replicas
from keras_tapefit.update.records import StepRecord
from keras_tapefit.update.rollback import Rollback
from keras_tapefit.update.update import Outcome, accumulate
from keras_tapefit.update.watch import Watch


class StepScope:
    """Gathers what the updates of one step leave, and undoes a rejected step.

    Args:
        runtime: the private side of the model.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.updated = False
        # Of a step of the user's own: whether it takes our tape and updates the loss
        # tracker, and what it read from metrics.
        self.used_tape = False
        self.tracked_loss = False
        # Whether it scales the loss, and calls the optimizer by itself.
        self.scaled_loss = False
        self.applied = False
        self.results: list[Any] = []
        self.report_names: list[str] = []
        self._rollback = runtime.rollback()
        self.loss: tf.Tensor | None = None
        self.weight: tf.Tensor | None = None
        # Whether replicas count by their weights, rather than alike.
        self.weighs_replicas = False
        self.parts: tuple[tf.Tensor, tf.Tensor] | None = None
        self._accepted: tf.Tensor | None = None
        self._reports: list[Report] = []
        records = runtime.recording.records
        self._record = None if records is None else StepRecord(records)

    def update(self, gradients: Gradients, optimizer: Any, scaled: bool) -> None:
        """Takes gradients to the weights and remembers the outcome."""
        runtime, record, watch = self.runtime, self._record, None
        if record is not None:
            watch = record.begin_update(optimizer, runtime.window_of(optimizer) is not None)
        outcome = self._outcome(gradients, optimizer, scaled, watch)
        if record is not None and outcome.seen is not None:
            record.end_update(gradients.variables, outcome.seen)
        self.updated = True
        self._reports.extend(outcome.reports)
        if outcome.accepted is not None:
            before = self._accepted
            self._accepted = outcome.accepted if before is None else before & outcome.accepted

    def _outcome(
        self, gradients: Gradients, optimizer: Any, scaled: bool, watch: Watch | None
    ) -> Outcome:
        runtime = self.runtime
        window = runtime.window_of(optimizer)
        if window is None:
            parts: Any = self.parts
            if parts is None and self.weight is not None and runtime.hooks.uses_parts:
                norm = tf.cast(gradients.global_norm(), tf.float32)
                parts = tf.reshape(norm, [1]), tf.reshape(self.weight, [1])
            share: Any = 1.0
            if self.weighs_replicas and self.weight is not None:
                share = replicas.relative_share(self.weight)
                gradients = gradients.scale(share)
                if self.loss is not None:
                    # A replica without an example has a loss that is no number.
                    self.loss = tf.math.multiply_no_nan(self.loss, share)
            parts = None if parts is None else (*parts, share)
            return runtime.update(gradients, optimizer, scaled, self.loss, parts, watch)
        weight = tf.constant(1.0) if self.weight is None else self.weight
        window.missing = [g is None for g in gradients.values()]
        step = (gradients, optimizer, runtime.hooks, scaled, window, weight)
        return accumulate(*step, self.settle, self.loss, watch)

    def settle(self, make_update: Callable[[], Outcome]) -> None:
        """Makes the update of a window of accumulated gradients, inside its branch."""
        rollback = None
        if self.runtime.may_reject():
            rollback = Rollback(self.runtime.hook_variables())
        outcome = make_update()
        if rollback is not None and outcome.accepted is not None:
            rollback.restore_unless(outcome.accepted)
        if self._record is not None:
            self._record.close_window(self.runtime.model.trainable_variables, outcome.seen)
        self._report(outcome.reports, outcome.accepted)

    def _report(self, reports: list[Report], accepted: tf.Tensor | None) -> None:
        if self.runtime.may_reject():
            skipped = tf.constant(0.0) if accepted is None else tf.cast(~accepted, tf.float32)
            reports = [*reports, Report(None, "skipped_steps", skipped, "sum")]
        if reports:
            names = self.runtime.reports.add(reports, accepted)
            self.report_names += [name for name in names if name not in self.report_names]

    def all_report_names(self) -> list[str]:
        """Returns the log entries that this step, or the window it is in, reports."""
        if self.runtime.window is None or not self.runtime.hooks:
            return self.report_names
        # The branch that closes the window is traced for one replica, and runs eagerly
        # at its last step only.
        return self.runtime.reports.names()

    def add_report(self, report: Report) -> None:
        """Adds a scalar to the logs, at the end of the step."""
        self._reports.append(report)

    def finish(self, logs: Any) -> Any:
        """Ends the step.

        Args:
            logs: what the step returned.

        Returns:
            The same, without what a rejected step would have put into it.
        """
        accepted = self._accepted
        if self._rollback is not None and accepted is not None:
            self._rollback.restore_unless(accepted)
            if isinstance(logs, dict):
                tracked = self.runtime.model.get_metrics_result()
                logs = {k: tracked.get(k, v) for k, v in logs.items()}
        if self.updated:
            self._report(self._reports, accepted)
            if self._record is not None:
                self._record.write(self.loss)
        return logs


class _Open(threading.local):
    scope: StepScope | None = None


_open = _Open()


@contextlib.contextmanager
def step_scope(runtime: Runtime) -> Iterator[StepScope]:
    """Opens the scope of a step in this thread; each replica has one."""
    outer, _open.scope = _open.scope, StepScope(runtime)
    try:
        yield _open.scope
    finally:
        _open.scope = outer


def open_scope(runtime: Runtime) -> StepScope | None:
    """Returns the scope of the step that runs in this thread for a model, if any."""
    scope = _open.scope
    return scope if scope is not None and scope.runtime is runtime else None


def note_loss(runtime: Runtime, loss: Any) -> None:
    """Remembers the loss of the step that is open, for hooks that look at it."""
    scope = open_scope(runtime)
    if scope is not None:
        scope.loss = loss


def note_parts(runtime: Runtime, norms: tf.Tensor, weights: tf.Tensor) -> None:
    """Remembers the norms of the gradients of the parts of a batch."""
    scope = open_scope(runtime)
    if scope is not None:
        scope.parts = (norms, weights)
