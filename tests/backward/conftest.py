"""The modes of `fit`."""

import pytest
from training import MODES

EVERYDAY = ("graph", "xla", "replicas")


@pytest.fixture(
    params=[m if m in EVERYDAY else pytest.param(m, marks=pytest.mark.slow) for m in MODES]
)
def mode(request) -> str:
    return request.param
