"""Set before TensorFlow starts: several CPU devices, and no silent AutoGraph."""

import gc
import os

os.environ.setdefault("AUTOGRAPH_STRICT_CONVERSION", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: F401, so that all of it is loaded
import pytest
import tensorflow as tf

NUM_DEVICES = 4

_CPUS = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    _CPUS[0], [tf.config.LogicalDeviceConfiguration() for _ in range(NUM_DEVICES)]
)


def settle() -> None:
    """Has garbage collection pass over what is there, which is there to stay.

    That is all of TensorFlow, and what it keeps of every model. To look through it takes
    half a second each time, and `keras.utils.clear_session` alone does that.
    """
    # What has become garbage since the last time goes first.
    gc.unfreeze()
    gc.collect()
    gc.freeze()


settle()


@pytest.fixture(scope="module", autouse=True)
def _settled():
    yield
    settle()
