"""`During`, the share of clipped steps, norms of layers, `freeze(train_bn=True)`, depth."""

import csv
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from everyday import everyday
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, callbacks, hooks

RNG = np.random.default_rng(12)
X, Y = RNG.normal(size=(24, 4)).astype("float32"), RNG.normal(size=(24, 2)).astype("float32")
FIT = {"batch_size": 4, "shuffle": False, "verbose": 0}


def make(*gradient_hooks, optimizer=None, **options):
    keras.utils.set_random_seed(8)
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh", name="a")(inputs)
    model = TapeModel(inputs, layers.Dense(2, name="b")(hidden))
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, "mse", gradient_hooks=gradient_hooks, **options)
    return model


def by_hand(acts, steps, factor=0.5):
    """Trains with a factor on the gradients in some steps, one batch at a time."""
    model = make()
    for step in range(steps):
        batch = slice(4 * (step % 6), 4 * (step % 6) + 4)
        gradients = model.compute_gradients(X[batch], Y[batch])
        model.apply_gradients(gradients.scale(factor if acts(step) else 1.0))
    return model.get_weights()


def same(a, b, rtol=1e-5):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-7)


WHEN = {
    "epochs": ({"epochs": (1, 2)}, lambda step: 6 <= step < 12),
    "first epochs": ({"epochs": 1}, lambda step: step < 6),
    "steps": ({"steps": (2, 9)}, lambda step: 2 <= step < 9),
    "every": ({"every": 4}, lambda step: step % 4 == 0),
    "all": (
        {"epochs": (0, 2), "steps": (1, 11), "every": 3},
        lambda step: step in (1, 4, 7, 10),
    ),
}
MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "executions": {"steps_per_execution": 3},
    "update": {"jit_compile": "update"},
}


@pytest.mark.parametrize("when", everyday(["all"], of=WHEN))
@pytest.mark.parametrize("mode", everyday(["executions"], of=MODES))
def test_it_acts_only_then(when, mode):
    arguments, acts = WHEN[when]
    model = make(hooks.During(hooks.GradientScaling(0.5), **arguments), **MODES[mode])
    model.fit(X, Y, epochs=3, **FIT)
    same(model.get_weights(), by_hand(acts, 18))


def test_the_state_of_a_hook_stays():
    """The history of norms holds those of the steps in which it acts."""
    inner = hooks.PercentileClipping(50, history=20)
    model = make(hooks.During(inner, steps=(2, 5)))
    history = callbacks.GradientHistory()
    model.fit(X, Y, callbacks=[history], **FIT)
    np.testing.assert_allclose(
        inner.variables[0].numpy()[:3], history["gradient_norm"][2:5], rtol=1e-5
    )
    assert int(inner.variables[1].numpy()) == 3


def test_log_entries_are_means_over_its_steps():
    model = make(hooks.During(hooks.GradientMonitor(), every=2))
    history = callbacks.GradientHistory()
    logs = model.fit(X, Y, epochs=2, callbacks=[history], **FIT).history
    expected = history["gradient_norm"].reshape(2, 6)[:, ::2].mean(axis=1)
    np.testing.assert_allclose(logs["gradient_norm"], expected, rtol=1e-5)
    none = make(hooks.During(hooks.GradientMonitor(), epochs=(1, 2)))
    logs = none.fit(X, Y, epochs=2, **FIT).history["gradient_norm"]
    assert np.isnan(logs[0]) and np.isfinite(logs[1])


def test_a_gate_and_a_hook_around_the_update():
    bad = X.copy()
    bad[8:12] = np.nan
    model = make(hooks.SkipNonFinite(), hooks.During(hooks.SkipNonFinite(), steps=(0, 1)))
    model.gradient_hooks.remove(model.gradient_hooks[0])
    model.fit(bad, Y, **FIT)
    assert not all(np.isfinite(w).all() for w in model.get_weights())
    model = make(hooks.During(hooks.SkipNonFinite(), steps=(1, 4)))
    logs = model.fit(bad, Y, **FIT).history
    assert logs["skipped_steps"] == [1.0]
    assert all(np.isfinite(w).all() for w in model.get_weights())
    model = make(hooks.During(hooks.LearningRateMultiplier(0.0), steps=(3, 100)))
    model.fit(X, Y, **FIT)
    same(model.get_weights(), by_hand(lambda step: False, 3))


def test_numbers_are_live_and_arguments_may_be_assigned():
    during = hooks.During(hooks.GradientScaling(0.5), every=2)
    model = make(during)
    model.fit(X, Y, **FIT)
    function = model.train_function
    during.hook.factor = 1.0
    model.fit(X, Y, **FIT)
    assert len(function._traces) == 1
    expected = by_hand(lambda step: step < 6 and step % 2 == 0, 12)
    same(model.get_weights(), expected)
    during.every = 1
    during.hook.factor = 0.0
    before = model.get_weights()
    model.optimizer.momentum = 0.0
    model.fit(X, Y, **FIT)
    assert len(function._traces) == 2
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        during.every = 0
    assert np.abs(model.get_weights()[0] - before[0]).max() < 1.0


def test_outputs_by_epoch():
    def stop(gradient, layer):
        return tf.zeros_like(gradient)

    model = make(hooks.During(hooks.OutputGradient(stop, "a"), epochs=(1, 2)))
    model.optimizer.momentum = 0.0
    weights = [model.get_weights()]
    for epoch in range(3):
        model.fit(X, Y, initial_epoch=epoch, epochs=epoch + 1, **FIT)
        weights.append(model.get_weights())
    moved = [not np.array_equal(a[0], b[0]) for a, b in zip(weights, weights[1:], strict=False)]
    assert moved == [True, False, True]
    monitor = hooks.During(hooks.OutputMonitor("a"), steps=(2, 4))
    history = callbacks.GradientHistory()
    make(monitor).fit(X, Y, callbacks=[history], **FIT)
    finite = np.isfinite(history["output_gradient_norm/a"])
    assert finite.tolist() == [False, False, True, True, False, False]
    with pytest.raises(ValueError, match="in some `epochs` only"):
        hooks.During(hooks.OutputGradient(stop), steps=3)


def test_replicas_and_windows():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = make(hooks.During(hooks.GradientScaling(0.5), every=2))
    model.fit(X, Y, **FIT)
    same(model.get_weights(), by_hand(lambda step: step % 2 == 0, 6))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)
    model = make(hooks.During(hooks.GradientScaling(0.5), every=2), optimizer=optimizer)
    model.fit(X, Y, **{**FIT, "batch_size": 2})
    same(model.get_weights(), by_hand(lambda step: step % 2 == 0, 6))


def test_names_configs_and_files(tmp_path):
    during = hooks.During(hooks.GlobalNormClipping(1.0), epochs=(1, 3), every=2)
    model = make(during, hooks.GlobalNormClipping(2.0))
    assert [hook.name for hook in model.gradient_hooks] == [
        "global_norm_clipping",
        "global_norm_clipping_1",
    ]
    model.fit(X, Y, epochs=2, **FIT)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(during)))
    restored = keras.saving.deserialize_keras_object(config)
    assert isinstance(restored.hook, hooks.GlobalNormClipping) and restored.every == 2
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for each in (model, loaded):
        each.fit(X, Y, initial_epoch=2, epochs=4, **FIT)
    same(model.get_weights(), loaded.get_weights(), rtol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"hook": 3}, TypeError, "`hook` must be a gradient hook"),
        ({"hook": hooks.Freezing("a/*", epochs=1)}, ValueError, "Freezing says itself when"),
        ({"hook": hooks.GradientScaling(1.0), "epochs": (2, 1)}, ValueError, "`epochs` must be"),
        ({"hook": hooks.GradientScaling(1.0), "steps": "all"}, TypeError, "`steps` must be"),
        ({"hook": hooks.GradientScaling(1.0), "every": 0}, ValueError, "`every` must be"),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        hooks.During(**arguments)


def test_a_function_and_a_copy():
    model = make(hooks.During(lambda g, v: g * 0.5, every=2))
    model.fit(X, Y, **FIT)
    same(model.get_weights(), by_hand(lambda step: step % 2 == 0, 6))
    import copy

    copied = copy.copy(model.gradient_hooks[0])
    assert copied.hook is not model.gradient_hooks[0].hook
    other = make(copied)
    other.fit(X, Y, **FIT)
    same(other.get_weights(), model.get_weights())
    shared = make(hooks.During(model.gradient_hooks[0].hook, name="mine"))
    with pytest.raises(ValueError, match="belongs to a list of its own already"):
        shared.fit(X, Y, **FIT)


CLIPS = {
    "GlobalNormClipping": lambda **o: hooks.GlobalNormClipping(1.0, **o),
    "NormClipping": lambda **o: hooks.NormClipping(0.7, **o),
    "ValueClipping": lambda **o: hooks.ValueClipping(1.0, **o),
    "BlockRMSClipping": lambda **o: hooks.BlockRMSClipping(0.3, **o),
    "AdaptiveClipping": lambda **o: hooks.AdaptiveClipping(3.0, **o),
    "PercentileClipping": lambda **o: hooks.PercentileClipping(50, **o),
    "ZScoreClipping": lambda **o: hooks.ZScoreClipping(0.5, num_warmup_steps=2, **o),
}


@pytest.mark.parametrize(
    "name",
    everyday(["GlobalNormClipping", "ValueClipping"], of=CLIPS),
)
def test_the_share_of_clipped_steps(name):
    model = make(CLIPS[name](log_clipped=True))
    history = callbacks.GradientHistory()
    logs = model.fit(X, Y, epochs=2, callbacks=[history], **FIT).history
    before, after = history["gradient_norm"], history["gradient_norm_after"]
    expected = (after < before * (1 - 1e-6)).reshape(2, 6).mean(axis=1)
    np.testing.assert_allclose(logs["clipped_steps"], expected, atol=1e-6)
    assert 0 < sum(logs["clipped_steps"]) <= 2
    named = make(CLIPS[name](log_clipped=True, name="mine"))
    assert "mine_clipped_steps" in named.fit(X, Y, **FIT).history
    same(named.get_weights(), _trained(CLIPS[name]()))
    with pytest.raises(TypeError, match="`log_clipped` must be a bool"):
        CLIPS[name](log_clipped=1)


def _trained(*gradient_hooks):
    model = make(*gradient_hooks)
    model.fit(X, Y, **FIT)
    return model.get_weights()


def test_norms_of_layers(tmp_path):
    model = make(hooks.GradientMonitor(per_layer=True, per_variable=True))
    writer = callbacks.GradientCSV(tmp_path / "g.csv", per_layer=True)
    history = callbacks.GradientHistory()
    logs = model.fit(X, Y, callbacks=[writer, history], **FIT).history
    for layer in "ab":
        parts = [history[f"gradient_norm/{layer}/{part}"] for part in ("kernel", "bias")]
        expected = np.sqrt(parts[0] ** 2 + parts[1] ** 2)
        np.testing.assert_allclose(logs[f"gradient_norm/{layer}"], [expected.mean()], rtol=1e-5)
        with open(tmp_path / "g.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found = [float(row[f"gradient_norm/{layer}"]) for row in rows]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert f"gradient_norm/{layer}/kernel" not in rows[0]
    with pytest.raises(TypeError, match="`per_layer` must be a bool"):
        hooks.GradientMonitor(per_layer="a")


def test_norms_of_layers_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make()
    board = callbacks.GradientTensorBoard(
        tmp_path, write_every=1, per_variable=False, updates=False, per_layer=True
    )
    history = callbacks.GradientHistory()
    model.fit(X, Y, callbacks=[board, history], **FIT)
    events = EventAccumulator(str(tmp_path / "gradients"), size_guidance={"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"gradient_norm/a", "gradient_norm_after/b"} <= tags
    assert "gradient_norm/a/kernel" not in tags
    values = [float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors("gradient_norm/a")]
    parts = [history[f"gradient_norm/a/{part}"] for part in ("kernel", "bias")]
    np.testing.assert_allclose(values, np.sqrt(parts[0] ** 2 + parts[1] ** 2), rtol=1e-5)


def normalized():
    keras.utils.set_random_seed(3)
    model = TapeSequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="base"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="head"),
        ]
    )
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("train_bn", [False, True])
def test_frozen_batch_normalization(train_bn, tmp_path):
    model = normalized()
    before = model.get_layer("norm").get_weights()
    model.freeze(["*/base/*", "*/norm/*"], train_bn=train_bn)
    model.fit(X, Y, **FIT)
    gamma, beta, mean, variance = model.get_layer("norm").get_weights()
    np.testing.assert_array_equal(gamma, before[0])
    np.testing.assert_array_equal(beta, before[1])
    assert np.array_equal(mean, before[2]) is not train_bn
    # As stock Keras has it: statistics run where the layer is trainable and its weights not.
    stock = keras.Sequential(normalized().layers)
    stock.get_layer("base").trainable = False
    if train_bn:
        for weight in stock.get_layer("norm").trainable_variables:
            weight.trainable = False
    else:
        stock.get_layer("norm").trainable = False
    stock.compile("sgd", "mse")
    stock.fit(X, Y, **FIT)
    same(model.get_weights(), stock.get_weights())
    # Saved, loaded and trained on.
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for each in (model, loaded):
        each.fit(X, Y, **FIT)
    same(model.get_weights(), loaded.get_weights(), rtol=0)
    assert loaded.get_layer("norm").trainable is train_bn
    model.unfreeze("*")
    model.fit(X, Y, **FIT)
    assert not np.array_equal(model.get_layer("norm").get_weights()[0], before[0])


def test_train_bn_is_a_bool():
    with pytest.raises(TypeError, match="`train_bn` must be a bool"):
        normalized().freeze("norm/*", train_bn="yes")


def test_depth_goes_into_a_base():
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, name="one")(inputs)
    base = keras.Model(inputs, layers.Dense(3, name="two")(hidden), name="base")
    model = TapeSequential([keras.Input((4,)), base, layers.ReLU(), layers.Dense(2, name="head")])
    found = hooks.learning_rates_by_depth(model, 0.5)
    assert [hook.factor for hook in found] == [0.25, 0.5]
    assert [hook.targets.name for hook in found] == ["one", "two"]
    model.compile(keras.optimizers.SGD(0.1), "mse", gradient_hooks=found)
    gradients = model.compute_gradients(X, Y)
    before = model.get_weights()
    model.fit(X, Y, batch_size=24, verbose=0)
    rates = [0.025, 0.025, 0.05, 0.05, 0.1, 0.1]
    for old, new, g, rate in zip(
        before, model.get_weights(), gradients.values(), rates, strict=True
    ):
        np.testing.assert_allclose(new, old - rate * np.asarray(g), rtol=1e-5, atol=1e-6)
