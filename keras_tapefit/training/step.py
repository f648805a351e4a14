"""One training step from its first line to its logs."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_tapefit.backward.base import Computed
from keras_tapefit.gradients.xla import in_xla
from keras_tapefit.hooks.step import LogEntry
from keras_tapefit.training import keras_trainer, losses
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.update import replicas
from keras_tapefit.update.compiled import make_update_compiled
from keras_tapefit.update.making import Outcome, accumulate, close, log, make_update
from keras_tapefit.update.records import StepRecord
from keras_tapefit.update.rollback import Rollback
from keras_tapefit.update.window import Window


class Step:
    """One step: how it is undone, recorded and logged.

    Args:
        runtime: the private side of the model.
        everything: whether the step may write to any variable and make several updates,
            so that all of them are put aside.
    """

    def __init__(self, runtime: Runtime, everything: bool = False) -> None:
        self.runtime = runtime
        self.updated = False
        self._everything = everything
        self._rejects = runtime.may_reject()
        self._undone: dict[int, Any] = {}
        self._rollbacks: list[Rollback] = []
        if self._rejects:
            self._put_aside(runtime.state.undone_variables(everything))
        # By window how often its optimizer was called, and the steps in it before.
        self._calls: dict[int, tuple[int, tf.Tensor]] = {}
        self._accepted: tf.Tensor | None = None
        self._entries_of_step: list[LogEntry] = []
        self._loss: Any = None
        self._record: StepRecord | None = None

    def _put_aside(self, variables: list[Any]) -> None:
        new = [v for v in variables if id(v) not in self._undone]
        self._undone.update((id(v), v) for v in new)
        self._rollbacks.append(Rollback(new))

    def noticing_new(self) -> Any:
        """Puts aside what variables begin with that are made in this context.

        A model that its first batch builds makes them in the middle of the step. In a
        graph they are made in a trace, and the step that runs knows them.
        """
        if not (self._rejects and tf.executing_eagerly()):
            return contextlib.nullcontext()

        def make(next_creator: Any, **kwargs: Any) -> Any:
            variable = next_creator(**kwargs)
            self._rollbacks.append(Rollback([variable]))
            return variable

        return tf.variable_creator_scope(make)

    def update(self, computed: Computed, optimizer: Any, scaled: bool = True) -> None:
        """Takes gradients to the weights: replicas, loss scale, hooks, gate, optimizer.

        Args:
            computed: what is known of the batch.
            optimizer: a built Keras optimizer.
            scaled: whether the gradients are those of the loss times the loss scale.
        """
        if self._rejects and self._everything:
            self._put_aside(list(optimizer.variables))
        self.runtime.prepare_hooks()
        if self._rejects:
            # What was made in this step, such as the state of its hooks.
            self._put_aside(self.runtime.state.undone_variables(self._everything))
        self.updated = True
        self._loss = computed.loss
        for name, (value, weight) in computed.logged.items():
            self.report(LogEntry(self.runtime.model, name, value, "mean", weight))
        if computed.taps:
            self._entries_of_step.extend(self.runtime.see_outputs(computed))
        with in_xla(bool(self.runtime.model.jit_compile)):
            outcome = self._outcome(computed, optimizer, scaled)
        self._entries_of_step.extend(outcome.entries)
        if outcome.accepted is not None:
            before = self._accepted
            self._accepted = outcome.accepted if before is None else before & outcome.accepted

    def _outcome(self, computed: Computed, optimizer: Any, scaled: bool) -> Outcome:
        runtime, watch = self.runtime, None
        hooks, window = runtime.hooks, runtime.windows.of(optimizer)
        records = runtime.recording.records
        if self._record is None and records is not None:
            # Not before: a model that its first batch builds has records since then.
            self._record = StepRecord(records)
        record = self._record
        if record is not None:
            watch = record.begin_update(optimizer, window is not None)
        gradients = computed.gradients
        if window is None:
            norms = computed.part_norms(replicas.count()) if hooks.uses_parts else None
            make = make_update_compiled if runtime.jit_compile == "update" else make_update
            outcome = make(gradients, optimizer, hooks, scaled, computed.loss, norms, watch)
        else:
            call, steps = self._calls.get(id(window)) or (0, window.begin_step())
            self._calls[id(window)] = (call + 1, steps)
            outcome = accumulate(
                computed,
                call,
                steps,
                optimizer,
                hooks,
                scaled,
                window,
                runtime.logs.entries,
                records,
                watch,
            )
        if record is not None and outcome.seen is not None:
            record.end_update(gradients.variables, outcome.seen)
        return outcome

    def report(self, entry: LogEntry) -> None:
        """Adds a scalar to the logs, at the end of the step."""
        self._entries_of_step.append(entry)

    def close_built_in(self, logs: Any) -> Any:
        """Ends the built-in step, which may be part of a custom one."""
        return self.close(logs)

    def close(self, logs: Any) -> Any:
        """Ends the step.

        Args:
            logs: what the step returned.

        Returns:
            The same, without what a rejected step would have put into it, and with what
            hooks report.
        """
        runtime, accepted = self.runtime, self._accepted
        if accepted is not None and self._rollbacks:
            # What was put aside first is what the step began with.
            for rollback in reversed(self._rollbacks):
                rollback.restore_unless(accepted)
            if isinstance(logs, dict):
                tracked = runtime.model.get_metrics_result()
                logs = {k: tracked.get(k, v) for k, v in logs.items()}
        if self.updated:
            if self._entries_of_step or self._rejects:
                own = {r.name for r in self._entries_of_step if r.hook is runtime.model}
                taken = {"loss", *(logs if isinstance(logs, dict) else ())} - own
                log(runtime.logs.entries, self._entries_of_step, accepted, self._rejects, taken)
            if self._record is not None:
                self._record.write(self._loss, self._entries_of_step)
        runtime.step_count.add(accepted)
        if not isinstance(logs, dict):
            return logs
        return {**logs, **runtime.logs.results()}


class CustomStep(Step):
    """The step of a custom `train_step`, or of a loop by hand.

    Args:
        runtime: the private side of the model.
        data: the batch; `None` in a loop by hand, where it is not known.

    Attributes:
        data: the batch, or `None`.
        used_tape: whether `gradient_tape` was called.
        used_method: whether the built-in step was, as `super().train_step(data)`.
        loss: the last one that was minimized, this replica's.
        results: what was read from metrics.
        tracked_loss: whether the loss tracker was updated.
        scaled_loss: whether the loss was scaled.
        applied: whether the optimizer was called past our tape.
    """

    def __init__(self, runtime: Runtime, data: Any = None) -> None:
        super().__init__(runtime, everything=True)
        self.data = data
        self.used_tape = False
        self.used_method = False
        self.loss: Any = None
        self.results: list[Any] = []
        self.tracked_loss = False
        self.scaled_loss = False
        self.applied = False

    def close_built_in(self, logs: Any) -> Any:
        self.used_method = True
        return logs

    # Not in `__init__`: a step that needs none of it gets no additional operation.
    @functools.cached_property
    def examples(self) -> tf.Tensor:
        """The number of examples in this replica's batch; 1 where it is not known."""
        return losses.batch_shape(self.data)

    @property
    def may_be_empty(self) -> bool:
        """Whether this replica may have no example."""
        if self.data is None or replicas.count() == 1:
            return False
        return keras_trainer.may_be_empty(self.data)


class _Open(threading.local):
    step: CustomStep | None = None


_open = _Open()


@contextlib.contextmanager
def custom_step(runtime: Runtime, data: Any) -> Iterator[CustomStep]:
    """Opens a step for a custom `train_step`, in this thread.

    Each replica has one. What the user calls (`gradient_tape`, `apply_gradients`,
    `super().train_step`) finds it by the thread.
    """
    outer, _open.step = _open.step, CustomStep(runtime, data)
    try:
        with _open.step.noticing_new():
            yield _open.step
    finally:
        _open.step = outer


def open_step(runtime: Runtime) -> CustomStep | None:
    """Returns the custom step that runs in this thread for a model, if any."""
    step = _open.step
    return step if step is not None and step.runtime is runtime else None


def close_windows(runtime: Runtime) -> None:
    """Makes an update of the steps that are left over at the end of an epoch."""
    for optimizer, window in runtime.windows.open():
        # What is frozen by now keeps its value.
        calls = {c: window.trained(c, runtime.candidates()) for c in window.known_calls()}
        trained = tuple(id(v) for variables in calls.values() for v in variables)
        runtime.run_once(
            (id(window), window.structure(), trained),
            functools.partial(_close_all, runtime, window, calls, optimizer),
        )


def _close_all(
    runtime: Runtime, window: Window, calls: dict[int, list[Any]], optimizer: Any
) -> None:
    where = (runtime.logs.entries, runtime.recording.records)
    for call, variables in calls.items():
        close(window, call, False, variables, optimizer, runtime.hooks, *where)
