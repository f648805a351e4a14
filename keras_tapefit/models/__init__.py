"""The models that a user makes."""

from keras_tapefit.models.model import TapeModel as TapeModel
from keras_tapefit.models.model import TapeSequential as TapeSequential
