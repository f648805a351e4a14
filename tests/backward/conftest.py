"""The modes of `fit`."""

import pytest
from training import MODES

# XLA and replicas are in the everyday slice of tests/equivalence.
EVERYDAY = ("graph",)


@pytest.fixture(
    params=[m if m in EVERYDAY else pytest.param(m, marks=pytest.mark.slow) for m in MODES]
)
def mode(request) -> str:
    return request.param
