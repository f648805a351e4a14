"""What no strategy can train is refused, with the reason and the way out."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

from . import support
from .support import X, Y, mirrored


def _model():
    keras.utils.set_random_seed(5)
    return support.dense()


def _sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def _fit(model):
    model.fit(X, Y, batch_size=24, shuffle=False, verbose=0)
    return model


class Lazy(TapeModel):
    def __init__(self):
        super().__init__()
        self.end = layers.Dense(2)

    def call(self, x):
        return self.end(x)


@pytest.mark.parametrize("wrap", [lambda o: o, support.scaled], ids=["plain", "loss_scale"])
def test_an_optimizer_made_outside_is_refused(wrap):
    optimizer = wrap(_sgd())
    with mirrored(2).scope():
        model = _model()
    with pytest.raises(ValueError, match="The optimizer was not made in the scope.*Mirrored"):
        model.compile(optimizer, "mse")


def test_an_optimizer_by_name_belongs_to_the_strategy():
    with mirrored(2).scope():
        model = _model()
    model.compile("adam", "mse", gradient_hooks=[support.sensitive])
    with mirrored(2).scope():
        inside = _model()
        inside.compile("adam", "mse", gradient_hooks=[support.sensitive])
    support.assert_same_bits(_fit(model), _fit(inside))
    assert int(model.optimizer.iterations.numpy()) == 2


def test_a_model_made_outside_is_refused():
    model = _model()
    with mirrored(2).scope():
        model.compile(_sgd(), "mse")
        with pytest.raises(ValueError, match="The model was not made in the scope"):
            _fit(model)


def test_all_made_outside_and_fit_inside_is_refused():
    model = _model()
    model.compile(_sgd(), "mse")
    with mirrored(2).scope(), pytest.raises(ValueError, match="Make the model inside `with"):
        _fit(model)


def test_a_model_compiled_inside_and_fit_outside_is_refused():
    model = _model()
    with mirrored(2).scope():
        model.compile(_sgd(), "mse")
    with pytest.raises(ValueError, match="The optimizer was not made in the scope"):
        _fit(model)


def test_a_model_without_weights_takes_the_strategy_it_is_fit_in():
    """As in Keras: nothing was made outside that could not be made inside."""
    keras.utils.set_random_seed(5)
    model = Lazy()
    with mirrored(2).scope():
        model.compile(
            _sgd(), "mse", gradient_hooks=[support.sensitive, hooks.GlobalNormClipping(0.5)]
        )
        _fit(model)
    keras.utils.set_random_seed(5)
    alone = Lazy()
    alone.compile(_sgd(), "mse", gradient_hooks=[support.sensitive, hooks.GlobalNormClipping(0.5)])
    assert support.difference(model, _fit(alone)) < 1e-6
    support.assert_replicas_agree(model)


def test_a_strategy_of_one_device_is_like_none():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = _model()
        model.compile(_sgd(), "mse", gradient_hooks=[support.sensitive])
    alone = _model()
    alone.compile(_sgd(), "mse", gradient_hooks=[support.sensitive], jit_compile=False)
    assert support.difference(_fit(model), _fit(alone)) < 1e-6


def test_xla_on_several_cpus_is_refused():
    with mirrored(2).scope():
        model = _model()
        with pytest.raises(ValueError, match="`jit_compile=True` does not work with several"):
            model.compile(_sgd(), "mse", jit_compile=True)
        model.compile(_sgd(), "mse", jit_compile="auto")


def test_a_compiled_update_has_no_effect_under_a_strategy():
    """It says so, and trains as without."""
    with mirrored(2).scope():
        model, plain = _model(), _model()
        with pytest.warns(UserWarning, match="`jit_compile='update'` has no effect under a `tf"):
            model.compile(_sgd(), "mse", jit_compile="update", gradient_hooks=[support.sensitive])
        plain.compile(_sgd(), "mse", gradient_hooks=[support.sensitive])
    support.assert_same_bits(_fit(model), _fit(plain))


def test_a_compiled_update_has_no_effect_in_eager_mode():
    with pytest.warns(UserWarning, match="`jit_compile='update'` has no effect with `run_eagerly"):
        _model().compile(_sgd(), "mse", jit_compile="update", run_eagerly=True)


def test_an_unknown_way_to_compile_is_refused():
    with pytest.raises(ValueError, match="must be True, False, 'auto' or 'update'. Received"):
        _model().compile(_sgd(), "mse", jit_compile="updates")


def test_a_parameter_server_is_refused():
    model = _model()
    # A real one needs servers to wait for.
    strategy = object.__new__(tf.distribute.ParameterServerStrategy)
    model._distribute_strategy = strategy
    with pytest.raises(ValueError, match="Use `tf.distribute.MultiWorkerMirroredStrategy`"):
        model.compile("adam", "mse")


@pytest.mark.slow
def test_replicas_keep_their_own_copy_of_what_a_file_holds(tmp_path):
    """Weights saved under a strategy are read without one, and the other way round."""
    two = support.trained("dense", _sgd, 2, gradient_hooks=[hooks.GlobalNormClipping(0.5)])
    two.save(tmp_path / "two.keras")
    one = keras.models.load_model(tmp_path / "two.keras")
    support.assert_same_bits(one, two)
    with mirrored(2).scope():
        again = keras.models.load_model(tmp_path / "two.keras")
    _fit(again)
    support.assert_replicas_agree(again)
    one.compile(one.optimizer, "mse", jit_compile=False)
    assert support.difference(again, _fit(one)) < 1e-6
    assert np.isfinite(again.evaluate(X, Y, verbose=0))
