"""How gradients come about."""

from keras_tapefit.backward.backpropagation import Backpropagation as Backpropagation
from keras_tapefit.backward.base import GradientMethod as GradientMethod
