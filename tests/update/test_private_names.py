"""The private names of Keras that `update/` stands on: they are there, and mean this."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit.gradients import layers_of
from keras_tapefit.update import optimizers


def _optimizer(variables, **options):
    optimizer = keras.optimizers.SGD(0.1, **options)
    optimizer.build(variables)
    return optimizer


def test_apply_all_reduces_by_its_own_method():
    """`already_reduced` puts a method of this name aside; it takes pairs and returns them."""
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        variable = keras.Variable(tf.zeros(()))
        optimizer = _optimizer([variable])

    def step(mute):
        if mute:
            with optimizers.already_reduced(optimizer):
                optimizer.apply([tf.constant(1.0)], [variable])
        else:
            optimizer.apply([tf.constant(1.0)], [variable])

    strategy.run(tf.function(step), args=(False,))
    np.testing.assert_allclose(variable.numpy(), -0.2, rtol=1e-6)
    strategy.run(tf.function(step), args=(True,))
    np.testing.assert_allclose(variable.numpy(), -0.3, rtol=1e-6)
    assert "_all_reduce_sum_gradients" not in vars(optimizer)
    assert callable(optimizer._all_reduce_sum_gradients)


def test_averages_are_beside_the_trainable_variables():
    variables = [keras.Variable(tf.fill((2,), float(i))) for i in range(3)]
    optimizer = _optimizer(variables, use_ema=True)
    assert all(v is w for v, w in zip(variables, optimizer._trainable_variables, strict=True))
    averages = optimizer._model_variables_moving_average
    assert [a.shape for a in averages] == [v.shape for v in variables]
    # Keras walks both from the start, which is why `average_only` shortens them.
    optimizers.average_only(optimizer, variables[1:])
    assert optimizer._trainable_variables[0] is variables[1]
    assert optimizer._model_variables_moving_average[0] is averages[1]
    assert len(optimizer._model_variables_moving_average) == 2


def test_the_map_of_a_multi_optimizer():
    module = pytest.importorskip("keras.src.optimizers.multi_optimizer")
    by_pattern = module.OptimizerMap(keras.optimizers.SGD())
    by_pattern["a/.*"] = keras.optimizers.Adam()
    optimizer = module.MultiOptimizer(by_pattern)
    assert list(optimizer._optimizer_map.keys()) == ["a/.*"]
    variables = [keras.Variable(tf.zeros(2), name="b")]
    # A pattern that matches nothing falls silently to the default optimizer in Keras.
    with pytest.warns(UserWarning, match=r"pattern 'a/\.\*' of the MultiOptimizer matches no"):
        optimizers.build(optimizer, variables)
    assert len(optimizer._trainable_variables) == 1


def test_flags_and_variables_of_layers():
    layer = layers.Dense(2)
    layer.build((None, 3))
    assert layer._trainable is True and len(layer._trainable_variables) == 2
    layer._trainable = False
    assert layer.trainable is False
    # The flag alone does not empty the list, which is what candidates are read from.
    assert len(layer._trainable_variables) == 2 and layer.trainable_variables == []
    # The setter passes the flag on to what is below; the attribute does not.
    outer = keras.Sequential([layer])
    outer._trainable = True
    assert layer._trainable is False


def test_layers_are_flattened_outer_first():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="deep")])
    model = keras.Sequential([inner, layers.Dense(1, name="last")])
    found = layers_of(model)
    assert found[0] is model and {"deep", "last"} <= {layer.name for layer in found}
    assert found.index(inner) < found.index(inner.layers[0])
