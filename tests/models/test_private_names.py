"""The private names of Keras that `models/` stands on: they are there, and mean this."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.tensorflow.trainer import reduce_per_replica
from keras.src.legacy.saving import saving_utils
from keras.src.losses import loss as losses
from keras.src.models import cloning
from keras.src.models.functional import Functional
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils.naming import auto_name

from keras_tapefit import TapeModel, TapeSequential
from keras_tapefit.training import keras_trainer

from . import support
from .support import STOCK, X, Y


def _model(**options):
    model = support.functional(STOCK)
    model.compile("sgd", "mse", **options)
    return model


def test_the_loss_of_a_trainer():
    """`_compute_loss` takes these arguments, whichever a user's `compute_loss` takes."""

    class Old(keras.Model):
        def compute_loss(self, x, y, y_pred, sample_weight):
            return 7.0

    model = Old()
    model.compile("sgd")
    arguments = {"x": X, "y": Y, "y_pred": Y, "sample_weight": None, "training": True}
    assert model._compute_loss(**arguments) == 7.0
    model = _model()
    assert model._loss_tracker.name == "loss"
    model._loss_tracker.update_state(2.0, sample_weight=3)
    model._loss_tracker.update_state(4.0, sample_weight=1)
    assert float(model._loss_tracker.result()) == 2.5
    assert keras.Model()._loss_tracker is None if hasattr(keras.Model(), "_loss_tracker") else True


def test_whether_a_call_takes_training():
    class Without(keras.Model):
        def call(self, x):
            return x

    assert Without()._call_has_training_arg is False
    assert support.functional(STOCK)._call_has_training_arg is True


def test_the_epoch_that_a_callback_begins_with(tmp_path):
    """`BackupAndRestore` puts it where `fit` reads it."""
    model = _model()
    assert model._initial_epoch is None
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[backup])
    resumed = _model()
    seen = []
    begin = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append(resumed._initial_epoch)
    )
    resumed.fit(X, Y, epochs=4, verbose=0, callbacks=[backup, begin])
    assert seen == [2]


def test_a_function_for_an_iterator():
    """`_make_function(step)` runs `step` on `steps_per_execution` batches."""
    model = _model(steps_per_execution=2, run_eagerly=True)
    seen = []

    def step(data):
        seen.append(int(data))
        return {"sum": data}

    function = model._make_function(step)
    logs = function(iter(tf.data.Dataset.range(4)))
    assert seen == [0, 1] and int(logs["sum"]) == 1


def test_what_is_traced_in_a_function_for_an_iterator():
    """One batch by `one_step_on_data`, behind a wrapper; all by `multi_step_on_iterator`."""
    function = keras_trainer.StepFunction(_model(), lambda data: {"shape": tf.shape(data)})
    for traced in (function.on_batch, function.on_iterator):
        assert isinstance(traced, tf.types.experimental.PolymorphicFunction)
    data = iter(tf.data.Dataset.range(5).batch(3))
    for size in (3, 2):
        logs = function(keras_trainer.Fetched(data, 1))
        assert int(logs["shape"][0]) == size
    with pytest.raises(StopIteration):
        keras_trainer.Fetched(data, 1)
    # By the shapes that are known of all batches, so once.
    assert function.on_batch.experimental_get_tracing_count() == 1


def test_results_of_an_epoch():
    """Metrics where the names agree, else the logs as they are."""
    model = _model()
    assert model._get_metrics_result_or_logs({"loss": 5.0})["loss"] == 0.0
    assert model._get_metrics_result_or_logs({"other": 5.0}) == {"other": 5.0}


def test_the_compiled_losses():
    model = _model()
    model._symbolic_build(data_batch=(X, Y, None))
    assert model._compile_loss.built
    (item,) = model._compile_loss._flat_losses
    assert callable(item.loss) and item.loss_weights is None
    assert item._replace(loss=abs).loss is abs
    assert float(model._aggregate_additional_loss(tf.constant([1.0, 2.0]))) == 3.0
    arguments = inspect.signature(model._maybe_symbolic_build).parameters
    assert list(arguments) == ["iterator", "data_batch"]


def test_strategies():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = support.functional(STOCK)
    assert model._distribute_strategy is strategy
    assert support.functional(STOCK)._distribute_strategy is None

    def scaled():
        share = losses.scale_loss_for_distribution(tf.constant(1.0))
        return share, losses.unscale_loss_for_distribution(share)

    share, whole = strategy.run(tf.function(scaled))
    values = strategy.experimental_local_results
    assert [float(v) for v in values(share)] == [0.5, 0.5]
    assert [float(v) for v in values(whole)] == [1.0, 1.0]
    assert float(reduce_per_replica(whole, strategy, reduction="auto")) == 1.0


def test_masks():
    output = tf.constant([[1.0]])
    assert get_keras_mask(output) is None
    set_keras_mask(output, tf.constant([True]))
    np.testing.assert_array_equal(get_keras_mask(output), [True])


def test_what_functional_models_are():
    inputs = keras.Input((2,))
    outputs = layers.Dense(1)(inputs)
    assert type(keras.Model(inputs, outputs)) is Functional
    assert isinstance(TapeModel(inputs, outputs), Functional)
    assert auto_name("thing").startswith("thing")
    # The first of the layers is the input's, which `Sequential.layers` leaves out.
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    assert isinstance(model._layers[0], layers.InputLayer) and len(model._layers) == 2


def test_cloning_is_ours_for_ours_only():
    arguments = inspect.signature(cloning._clone_sequential_model).parameters
    assert list(arguments) == ["model", "clone_function", "input_tensors"]
    arguments = inspect.signature(cloning._clone_functional_model).parameters
    assert list(arguments)[0] == "model"
    assert type(keras.models.clone_model(keras.Sequential([layers.Dense(1)]))) is keras.Sequential
    clone = keras.models.clone_model(TapeSequential([layers.Dense(1)]))
    assert type(clone) is TapeSequential


def test_what_pickle_and_compile_call():
    model = _model()
    remake, arguments = KerasSaveable.__reduce__(model)
    assert remake.__func__ is KerasSaveable._unpickle_model.__func__ and len(arguments) == 1
    np.testing.assert_array_equal(remake(*arguments)(X), model(X))
    model._assert_compile_called("fit")
    with pytest.raises(ValueError, match="compile"):
        support.functional(STOCK)._assert_compile_called("fit")


def test_where_functional_models_are_made():
    """All go through `keras.Model.__init__`, which rewrites classes that are not ours."""
    assert keras.Model.__init__.__wrapped__.__module__ == "keras.src.models.model"
    plain = type("Plain", (keras.Model,), {})
    inputs = keras.Input((2,))
    outputs = layers.Dense(1)(inputs)
    plain(inputs, outputs)
    assert plain.__bases__ == (Functional,)
    ours = type("Ours", (TapeModel,), {})
    ours(inputs, outputs)
    assert ours.__bases__ == (TapeModel,)


def test_what_legacy_files_are_written_by():
    metadata = saving_utils.model_metadata.__wrapped__(_model())
    assert metadata["model_config"]["class_name"] == "Functional"
    assert set(metadata["training_config"]) >= {"loss", "metrics", "optimizer_config"}
    arguments = inspect.signature(saving_utils.compile_args_from_training_config).parameters
    assert list(arguments) == ["training_config", "custom_objects"]


def test_what_a_tracker_keeps():
    model = _model()
    config = model._tracker.config
    assert set(config) == {
        "trainable_variables",
        "non_trainable_variables",
        "metrics",
        "layers",
        "seed_generators",
    }
    assert config["trainable_variables"][1] is model._trainable_variables
    assert config.keys() == model._tracker.stored_ids.keys()
    lazy = TapeModel()
    assert lazy._tracker.locked is False and lazy._tracker._lock_violation_msg is None
    lazy._lock_state()
    assert lazy._tracker.locked and "already built" in lazy._tracker._lock_violation_msg


def test_a_variable_is_tracked_by_its_trainable():
    layer = layers.Layer()
    variable = keras.Variable(1.0, trainable=False)
    layer._track_variable(variable)
    assert layer._non_trainable_variables == [variable] and not layer._trainable_variables
    layer._untrack_variable(variable)
    assert not layer._non_trainable_variables


def test_the_epoch_at_which_a_training_goes_on():
    """`fit` begins with `_initial_epoch`, where a callback sets it when the training begins."""

    class Later(keras.callbacks.Callback):
        epochs: list = []

        def on_train_begin(self, logs=None):
            self.model._initial_epoch = 2

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs.append(epoch)

    model = _model()
    model.fit(X, Y, epochs=4, verbose=0, callbacks=[Later()])
    assert Later.epochs == [2, 3]


def test_files_of_backups(tmp_path):
    """Two, and one more of each with `double_checkpoint`; weights are written first."""
    backup = keras.callbacks.BackupAndRestore(tmp_path / "a", double_checkpoint=True)
    assert str(backup._weights_path).endswith("latest.weights.h5")
    assert backup._prev_weights_path == f"{backup._weights_path}.bkp"
    assert str(backup._training_metadata_path).endswith("training_metadata.json")
    assert backup._prev_training_metadata_path == f"{backup._training_metadata_path}.bkp"


def test_what_a_model_is_saved_to(tmp_path):
    """`H5IOStore` has the whole file as `h5_file`; private attributes are saved last."""
    model = support.functional()
    model.compile("adam", "mse")
    seen = []

    def save(store):
        store.h5_file.visit(seen.append)
        assert type(store).__name__ == "H5IOStore"

    model._tapefit_state.save_own_variables = save
    model.save_weights(tmp_path / "a.weights.h5")
    assert {"layers", "optimizer"} <= set(seen)
