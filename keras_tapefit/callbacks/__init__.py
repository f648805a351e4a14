"""Callbacks that record every step: in memory, in a file, in TensorBoard."""

from keras_tapefit.callbacks.diagnosis import Finding as Finding
from keras_tapefit.callbacks.diagnosis import Report as Report
from keras_tapefit.callbacks.gradient_csv import GradientCSV as GradientCSV
from keras_tapefit.callbacks.gradient_history import GradientHistory as GradientHistory
from keras_tapefit.callbacks.gradient_tensorboard import (
    GradientTensorBoard as GradientTensorBoard,
)
from keras_tapefit.gradients.public import publish as _publish

_publish(globals())
