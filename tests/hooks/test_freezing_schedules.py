"""Freezing by epochs, steps and stages."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, hooks

RNG = np.random.default_rng(31)
X, Y = RNG.normal(size=(16, 3)), RNG.normal(size=(16, 1))


def _model(*gradient_hooks, optimizer="adam", **options):
    keras.utils.set_random_seed(4)
    inputs = keras.Input((3,))
    hidden = layers.Dense(3, name="a")(inputs)
    hidden = layers.BatchNormalization(name="norm")(hidden)
    hidden = layers.Dense(3, name="b")(hidden)
    model = TapeModel(inputs, layers.Dense(1, name="c")(hidden))
    optimizer = keras.optimizers.get(optimizer)
    model.compile(optimizer, "mse", gradient_hooks=gradient_hooks, **options)
    return model


class Moved(keras.callbacks.Callback):
    """Which layers changed, epoch by epoch, or step by step."""

    def __init__(self, by="epoch"):
        super().__init__()
        self.rows = []
        setattr(self, f"on_{by}_begin" if by == "epoch" else "on_train_batch_begin", self._begin)
        setattr(self, f"on_{by}_end" if by == "epoch" else "on_train_batch_end", self._end)

    def _begin(self, index, logs=None):
        self._before = {v.path: v.numpy() for v in self.model.variables}

    def _end(self, index, logs=None):
        moved = {
            v.path.split("/")[0]
            for v in self.model.variables
            if not np.array_equal(v.numpy(), self._before[v.path])
        }
        self.rows.append("".join(sorted(moved - {"norm"})) + ("n" if "norm" in moved else ""))


def _moved(model, epochs, by="epoch", batch_size=8, **options):
    moved = Moved(by)
    model.fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[moved],
        **options,
    )
    return moved.rows


def test_freezing_by_epochs():
    model = _model(hooks.Freezing(["a/*", "norm/*"], epochs=1), hooks.Freezing("c/*", (1, 3)))
    assert _moved(model, 4) == ["bc", "abn", "abn", "abcn"]


def test_freezing_by_steps():
    model = _model(hooks.Freezing("a/*", steps=(1, 3)), hooks.Freezing("b/*", steps=2))
    # Two steps an epoch: ranges go on from one epoch, and one `fit`, to the next.
    assert _moved(model, 1, by="step") == ["acn", "cn"]
    assert _moved(model, 1, by="step") == ["bcn", "abcn"]


def test_steps_are_those_of_the_optimizer():
    model = _model(hooks.SkipNonFinite(), hooks.Freezing("a/*", steps=1))
    targets = Y.copy()
    targets[:8] = np.nan
    moved = Moved("step")
    model.fit(X, targets, batch_size=8, shuffle=False, epochs=2, verbose=0, callbacks=[moved])
    assert moved.rows == ["", "bcn", "", "abcn"]


def test_one_trace_for_each_set_of_variables():
    traces = []

    def count(gradient, variable):
        traces.append(variable.path)

    model = _model(hooks.Freezing("a/*", epochs=(1, 3)), hooks.LambdaHook(count, targets="c/bias"))
    assert _moved(model, 5) == ["abcn", "bcn", "bcn", "abcn", "abcn"]
    assert _moved(model, 2) == ["abcn", "bcn"]
    assert len(traces) == 2


def test_freezing_for_good_and_removal():
    model = _model()
    with model.register_gradient_hook(hooks.Freezing("b/*")):
        assert _moved(model, 2) == ["acn", "acn"]
    assert _moved(model, 1) == ["abcn"]


def test_gradual_unfreezing():
    model = _model(hooks.GradualUnfreezing(["c/*", "b/*", ["norm/*", "a/*"]], every=2))
    assert _moved(model, 5) == ["c", "c", "bc", "bc", "abcn"]


def test_what_is_in_no_stage_trains_and_an_earlier_stage_wins():
    model = _model(hooks.GradualUnfreezing(["c/*", ["c/kernel", "b/*"]]))
    assert _moved(model, 2) == ["acn", "abcn"]


def test_targets_narrow_the_stages():
    model = _model(hooks.GradualUnfreezing(["c/*", "*/kernel"], targets=["c/*", "b/*"]))
    before = model.get_layer("b").kernel.numpy()
    assert _moved(model, 1) == ["abcn"]  # the bias of b
    np.testing.assert_array_equal(model.get_layer("b").kernel.numpy(), before)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize("way", ["model", "weights"])
def test_resume_in_any_phase(tmp_path, phase, way):
    def make():
        return _model(
            hooks.GradualUnfreezing(["c/*", "b/*"], every=2), hooks.Freezing("a/*", steps=(2, 6))
        )

    whole = make()
    expected = _moved(whole, 4)
    assert expected == ["acn", "cn", "bcn", "abcn"]
    part = make()
    assert _moved(part, phase) == expected[:phase]
    if way == "model":
        part.save(tmp_path / "part.keras")
        resumed = keras.models.load_model(tmp_path / "part.keras")
    else:
        # As `BackupAndRestore` does: a new model, weights and optimizer from a file.
        part.save_weights(tmp_path / "part.weights.h5")
        resumed = make()
        resumed.train_on_batch(X[:8], Y[:8])
        resumed.load_weights(tmp_path / "part.weights.h5")
        pairs = zip(resumed.optimizer.variables, part.optimizer.variables, strict=True)
        for new, old in pairs:
            new.assign(old)
    assert _moved(resumed, 4, initial_epoch=phase) == expected[phase:]
    for a, b in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_values_and_slots_stay_bit_for_bit(optimizer):
    model = _model(hooks.Freezing("b/*", epochs=(1, 2)), optimizer=optimizer)
    _moved(model, 1)
    slots = [v for v in model.optimizer.variables if "b_kernel" in v.path or "b_bias" in v.path]
    before = [v.numpy() for v in [*slots, *model.get_layer("b").variables]]
    _moved(model, 2, initial_epoch=1)
    for variable, value in zip([*slots, *model.get_layer("b").variables], before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_frozen_variables_have_no_share_in_norms():
    model = _model(hooks.Freezing(["a/*", "b/*", "norm/*"], epochs=1), hooks.GradientMonitor())
    model.compile("sgd", "mse")
    gradients = model.compute_gradients(X, Y).select("c/*")
    batch_normalization_trains = model.get_layer("norm").trainable
    history = model.fit(X, Y, batch_size=16, verbose=0).history
    assert batch_normalization_trains and history["gradient_norm"][0] > 0
    model.get_layer("norm").trainable = True
    assert len(gradients) == 2


def test_schedules_with_steps_per_execution_and_xla():
    for options in ({"steps_per_execution": 2}, {"jit_compile": True}, {"run_eagerly": True}):
        model = _model(hooks.GradualUnfreezing(["c/*", ["b/*", "norm/*"], "a/*"]), **options)
        assert _moved(model, 3) == ["c", "bcn", "abcn"]


WRONG = [
    (lambda: hooks.Freezing(None), ValueError, "`targets` must say what to freeze. Received: targ"),
    (lambda: hooks.Freezing("a", 1.5), TypeError, "`epochs` must be an integer, a pair of integ"),
    (lambda: hooks.Freezing("a", True), TypeError, "Received: epochs=True"),
    (lambda: hooks.Freezing("a", (1, 2, 3)), TypeError, r"Received: epochs=\(1, 2, 3\)"),
    (lambda: hooks.Freezing("a", (2, 1)), ValueError, "`epochs` must be positive, and a pair asc"),
    (lambda: hooks.Freezing("a", 0), ValueError, "Received: epochs=0"),
    (lambda: hooks.Freezing("a", steps="2"), TypeError, "`steps` must be an integer, a pair"),
    (lambda: hooks.Freezing("a", steps=-1), ValueError, "`steps` must be positive"),
    (lambda: hooks.Freezing("a", 1, steps=1), ValueError, "Give `epochs` or `steps`, not both"),
    (lambda: hooks.GradualUnfreezing("a/*"), TypeError, "`stages` must be a list of targets, one"),
    (lambda: hooks.GradualUnfreezing([]), TypeError, r"Received: stages=\[\]"),
    (lambda: hooks.GradualUnfreezing(["a", None]), TypeError, "`stages` must be a list of targets"),
    (lambda: hooks.GradualUnfreezing(["a", 3]), TypeError, "`targets` must be a layer, .*Rec.*: 3"),
    (lambda: hooks.GradualUnfreezing(["a"], every=0), ValueError, "`every` must be at least 1"),
    (lambda: hooks.GradualUnfreezing(["a"], every=0.5), TypeError, "`every` must be an integer"),
]


@pytest.mark.parametrize(("make", "error", "text"), WRONG)
def test_wrong_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_stage_must_match():
    model = _model(hooks.GradualUnfreezing(["c/*", "encoder/*"]))
    with pytest.raises(ValueError, match=r"'encoder/\*' matches no variable") as caught:
        model.fit(X, Y, verbose=0)
    assert "\n  a/kernel" in str(caught.value)
