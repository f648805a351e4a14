"""KerasTuner: hooks as hyperparameters, failed trials, traces that are reused."""

from keras_tapefit.gradients.public import publish as _publish
from keras_tapefit.tuning.health import GradientHealth as GradientHealth
from keras_tapefit.tuning.hyper_model import TapeHyperModel as TapeHyperModel
from keras_tapefit.tuning.search_space import gradient_hooks as gradient_hooks
from keras_tapefit.tuning.search_space import gradient_method as gradient_method

_publish(globals())
