"""Set before TensorFlow starts: several CPU devices, and no silent AutoGraph."""

import gc
import os

os.environ.setdefault("AUTOGRAPH_STRICT_CONVERSION", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: F401, so that all of it is loaded
import tensorflow as tf

NUM_DEVICES = 4

_CPUS = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    _CPUS[0], [tf.config.LogicalDeviceConfiguration() for _ in range(NUM_DEVICES)]
)

# Nothing of TensorFlow itself is ever garbage, and looking through it takes 0.3 s each
# time: `keras.utils.clear_session` alone does that twice.
gc.collect()
gc.freeze()
