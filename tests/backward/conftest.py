"""The modes of `fit`, and layers in float64."""

import keras
import pytest
from everyday import everyday
from training import MODES

# XLA and replicas are in the everyday slice of tests/equivalence.
EVERYDAY = ("graph",)


@pytest.fixture(params=everyday(EVERYDAY, of=MODES))
def mode(request) -> str:
    return request.param


@pytest.fixture
def float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(before)
