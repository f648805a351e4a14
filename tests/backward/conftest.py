"""The modes of `fit`."""

import pytest
from training import MODES


@pytest.fixture(params=MODES)
def mode(request) -> str:
    return request.param
