"""Set before TensorFlow starts: several CPU devices, and no silent AutoGraph."""

import os

os.environ.setdefault("AUTOGRAPH_STRICT_CONVERSION", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

NUM_DEVICES = 4

_CPUS = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    _CPUS[0], [tf.config.LogicalDeviceConfiguration() for _ in range(NUM_DEVICES)]
)
