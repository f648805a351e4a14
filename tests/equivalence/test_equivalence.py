"""Every hook, in every mode, with every optimizer: against a plain graph."""

import itertools

import numpy as np
import pytest

from keras_tapefit import backward, hooks

from . import cases

EVERYDAY = ("embedding", "SGD")
EVERYDAY_MODES = [mode for mode in cases.MODES if mode.everyday]


def _marks(hook, mode, model, optimizer):
    """Each hook has one mode every day, the others of these with the slow tests."""
    if not mode.everyday or (model, optimizer) != EVERYDAY:
        return [pytest.mark.slow, pytest.mark.long]
    place = list(cases.HOOKS).index(hook) % len(EVERYDAY_MODES)
    return [] if EVERYDAY_MODES[place] is mode else [pytest.mark.slow]


CELLS = [
    pytest.param(*cell, marks=_marks(*cell), id="{}-{.name}-{}-{}".format(*cell))
    for cell in itertools.product(cases.HOOKS, cases.MODES, cases.MODELS, cases.OPTIMIZERS)
]


@pytest.mark.parametrize(("hook", "mode", "model", "optimizer"), CELLS)
def test_equals_a_plain_graph(hook, mode, model, optimizer):
    for left_out, reason in mode.leaves_out.items():
        if left_out in (hook, optimizer, model):
            pytest.skip(reason)
    found = cases.differences(hook, mode, optimizer, model)
    assert max(found.values()) <= mode.tolerance, found


@pytest.mark.parametrize("hook", cases.HOOKS)
def test_every_hook_has_something_to_do(hook):
    """Otherwise its line in the table would prove nothing."""
    model, optimizer = EVERYDAY
    with_hook = cases.reference(hook, optimizer, model)
    assert np.isfinite(with_hook.weights).all()
    # Where the noise drowns the signal, there is no scale to log.
    logs = {name: v for name, v in with_hook.logs.items() if name != "noise_scale"}
    assert all(np.isfinite(values).all() for values in logs.values())
    if cases.HOOKS[hook].bad_target is not None:
        # Without the hook the bad example does harm.
        logs = with_hook.logs
        assert logs.get("skipped_steps", [1.0, 1.0]) == [1.0, 1.0], logs
    own = {"UpdateMonitor": "update_ratio", "GradientMonitor": "gradient_norm"}
    if hook in own:
        assert own[hook] in with_hook.logs


def test_everything_public_is_in_the_table():
    used = {type(h).__name__ for case in cases.HOOKS.values() for h in case.hooks()}
    used |= {type(case.backward()).__name__ for case in cases.HOOKS.values() if case.backward}
    public = {
        name
        for module, base in ((hooks, hooks.GradientHook), (backward, backward.GradientMethod))
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base)
    }
    # Functions, micro-batches and plain backpropagation are in other lines.
    bases = {"GradientHook", "GradientMethod"}
    others = {"LambdaHook", "Backpropagation", "MicroBatches"}
    assert public - used == bases | others
