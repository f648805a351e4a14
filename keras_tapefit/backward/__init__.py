"""How gradients come about."""

from keras_tapefit.backward.backpropagation import Backpropagation as Backpropagation
from keras_tapefit.backward.base import GradientMethod as GradientMethod
from keras_tapefit.backward.micro_batches import MicroBatches as MicroBatches
from keras_tapefit.backward.per_example_clipping import PerExampleClipping as PerExampleClipping
from keras_tapefit.backward.projected_conflicts import ProjectedConflicts as ProjectedConflicts
from keras_tapefit.backward.sharpness_aware import SharpnessAware as SharpnessAware
from keras_tapefit.gradients.public import publish as _publish

_publish(globals())
