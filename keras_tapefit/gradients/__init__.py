"""Gradients by variable, the targets that select them, unit axes."""

from keras_tapefit.gradients import units as units
from keras_tapefit.gradients.gradients import ByVariable as ByVariable
from keras_tapefit.gradients.gradients import Gradients as Gradients
from keras_tapefit.gradients.layers import layers_of as layers_of
from keras_tapefit.gradients.public import publish as _publish
from keras_tapefit.gradients.targets import Targets as Targets
from keras_tapefit.gradients.targets import deserialize_targets as deserialize_targets
from keras_tapefit.gradients.targets import matching as matching
from keras_tapefit.gradients.targets import serialize_targets as serialize_targets
from keras_tapefit.gradients.targets import variable_path as variable_path

_publish(globals(), "units")
