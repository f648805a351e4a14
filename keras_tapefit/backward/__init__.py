"""How gradients come about."""

from keras_tapefit.backward.backpropagation import Backpropagation as Backpropagation
from keras_tapefit.backward.base import GradientMethod as GradientMethod
from keras_tapefit.backward.micro_batches import MicroBatches as MicroBatches
