"""The arguments that `compile` takes besides Keras's own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import keras
import tensorflow as tf

from keras_tapefit.backward import Backpropagation
from keras_tapefit.gradients import Targets
from keras_tapefit.gradients.checks import check_count
from keras_tapefit.hooks import HookHandle
from keras_tapefit.training import building, keras_trainer
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.update import trainable

Compile = TypeVar("Compile", bound=Callable[..., None])
# Asked for here: `keras.Model` may be another class later, in tests that swap it.
_KERAS_COMPILE = keras.Model.compile


def is_of_keras(compile: Any) -> bool:
    """Whether a model's `compile` is that of `keras.Model` itself."""
    return keras_trainer.function_of(compile) is _KERAS_COMPILE


def passed_on(compile: Compile) -> Compile:
    """Has a `compile` pass on to one of another class's what it is called with.

    That may take other arguments, and mean others where they are left out.

    Args:
        compile: of `TapeTrainer`, which takes Keras's arguments and ours.
    """

    @functools.wraps(compile)
    def passing_on(model: Any, *args: Any, **kwargs: Any) -> None:
        if is_of_keras(model._next_compile()):
            compile(model, *args, **kwargs)
            return
        ours = {name: kwargs.pop(name, value) for name, value in _DEFAULTS.items()}
        model._compile(args, kwargs, **ours)

    return cast(Compile, passing_on)


_DEFAULTS = {"gradient_hooks": None, "backward": None, "micro_batches": 1}


def check(model: Any, jit_compile: Any, micro_batches: Any) -> None:
    """Refuses what cannot be trained, with the way out.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: when `micro_batches` is not positive, `jit_compile` is no value it
            can have, or the model's strategy cannot train it.
    """
    check_count("micro_batches", micro_batches)
    if not (jit_compile is None or isinstance(jit_compile, bool)) and (
        jit_compile not in ("auto", "update")
    ):
        raise ValueError(
            "`jit_compile` must be True, False, 'auto' or 'update'. "
            f"Received: jit_compile={jit_compile!r}."
        )
    strategy = model.distribute_strategy
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "A ParameterServerStrategy cannot run `fit`: its workers train without "
            "waiting for each other, so the gradient of the whole batch does not exist. Use "
            "`tf.distribute.MultiWorkerMirroredStrategy`, or `MirroredStrategy` on one "
            "machine."
        )
    if jit_compile is not True or strategy.num_replicas_in_sync == 1:
        return
    if all("CPU" in device for device in strategy.extended.worker_devices):
        raise ValueError(
            "`jit_compile=True` does not work with several replicas on CPUs: XLA cannot "
            "update variables on another device. Leave `jit_compile='auto'`, or train "
            "on one device."
        )


def keras_jit_compile(model: Any, jit_compile: Any, run_eagerly: bool) -> Any:
    """Returns what Keras receives as `jit_compile`; warns where it has no effect."""
    if jit_compile != "update":
        return jit_compile
    if run_eagerly:
        warnings.warn("`jit_compile='update'` has no effect with `run_eagerly=True`.", stacklevel=3)
    elif keras_trainer.strategy_of(model) is not None:
        warnings.warn(
            "`jit_compile='update'` has no effect under a `tf.distribute` strategy: the "
            "update of its variables cannot be compiled separately. Hooks and optimizer "
            "run as without it.",
            stacklevel=3,
        )
    return False


def serialize(runtime: Runtime) -> dict[str, Any]:
    """Returns the arguments as a config holds them, those at their default left out."""
    config: dict[str, Any] = {}
    if runtime.hooks:
        config["gradient_hooks"] = runtime.hooks.serialize()
    if type(runtime.backward) is not Backpropagation:
        config["backward"] = keras.saving.serialize_keras_object(runtime.backward)
    if runtime.micro_batches != 1:
        config["micro_batches"] = runtime.micro_batches
    if runtime.jit_compile == "update":
        config["jit_compile"] = "update"
    frozen = [i for i, v in enumerate(runtime.candidates()) if not v.trainable]
    if frozen:
        config["frozen"] = frozen
        running = trainable.running_statistics(runtime.model)
        if running:
            config["running"] = running
    return config


def register(runtime: Runtime, hook: Any, targets: Targets, name: str | None) -> HookHandle:
    """Adds a hook to a model's list; see `TapeModel.register_gradient_hook`."""
    model = runtime.model
    # A model that owns a variable before it is built has others to come.
    is_known = model.built or building.parts_are_built(model)
    return runtime.hooks.register(hook, targets, name, runtime.candidates() if is_known else ())
