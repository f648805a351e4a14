"""The arguments that `compile` takes beside Keras's own."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward import Backpropagation
from keras_tapefit.gradients import Targets, matching
from keras_tapefit.gradients.targets import check_targets
from keras_tapefit.hooks import HookHandle
from keras_tapefit.hooks.hook_list import as_hook
from keras_tapefit.training import keras_trainer
from keras_tapefit.training.runtime import Runtime


def check(model: Any, jit_compile: Any, micro_batches: Any) -> None:
    """Refuses what cannot be trained, with the way out.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: when `micro_batches` is not positive, `jit_compile` is no value it
            can have, or the model's strategy cannot train it.
    """
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int):
        raise TypeError(
            f"`micro_batches` must be an integer. Received: micro_batches={micro_batches!r}."
        )
    if micro_batches < 1:
        raise ValueError(
            f"`micro_batches` must be at least 1. Received: micro_batches={micro_batches}."
        )
    if isinstance(jit_compile, str) and jit_compile not in ("auto", "update"):
        raise ValueError(
            "`jit_compile` must be True, False, 'auto' or 'update'. "
            f"Received: jit_compile={jit_compile!r}."
        )
    strategy = model.distribute_strategy
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "A ParameterServerStrategy cannot run `fit`: its workers train without "
            "waiting for each other, so there is no gradient of the whole batch. Use "
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
    """Returns what Keras is to know of `jit_compile`, and says where it has no effect."""
    if jit_compile != "update":
        return jit_compile
    if run_eagerly:
        warnings.warn("`jit_compile='update'` has no effect with `run_eagerly=True`.", stacklevel=3)
    elif keras_trainer.strategy_of(model) is not None:
        warnings.warn(
            "`jit_compile='update'` has no effect under a `tf.distribute` strategy: the "
            "update of its variables cannot be compiled by itself. Hooks and optimizer "
            "run as without it.",
            stacklevel=3,
        )
    return False


def serialize(runtime: Runtime) -> dict[str, Any]:
    """Returns the arguments as a config holds them, those at their default left out."""
    config: dict[str, Any] = {}
    if runtime.hooks:
        config["gradient_hooks"] = [
            keras.saving.serialize_keras_object(hook) for hook in runtime.hooks
        ]
    if type(runtime.backward) is not Backpropagation:
        config["backward"] = keras.saving.serialize_keras_object(runtime.backward)
    if runtime.micro_batches != 1:
        config["micro_batches"] = runtime.micro_batches
    if runtime.jit_compile == "update":
        config["jit_compile"] = "update"
    frozen = [i for i, v in enumerate(runtime.candidates()) if not v.trainable]
    if frozen:
        config["frozen"] = frozen
    return config


def register(runtime: Runtime, hook: Any, targets: Targets, name: str | None) -> HookHandle:
    """Adds a hook to a model's list; see `TapeModel.register_gradient_hook`."""
    hook = as_hook(hook)
    check_targets(targets)
    if targets is not None and hook.targets is not None:
        raise ValueError(
            f"The hook {hook.name!r} has `targets` of its own. Pass them in one place only."
        )
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: name={name!r}.")
    if hook._registered_name is None:
        hook.targets = hook.targets if targets is None else targets
        hook._name = hook._name if name is None else name
    candidates = runtime.candidates()
    if candidates:
        matching(hook.targets, candidates)
    runtime.hooks.append(hook)
    return HookHandle(runtime.hooks, hook)
