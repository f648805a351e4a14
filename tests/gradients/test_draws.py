"""Random numbers in every mode, and against their distributions."""

import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit.gradients import draws


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "XLA"])
def test_the_same_in_every_mode(options):
    step = tf.Variable(7, dtype=tf.int64)
    for draw in (draws.uniform, draws.normal):
        eager = draw((3, 5), (2**31 + 5, step))
        traced = tf.function(lambda: draw((3, 5), (2**31 + 5, step)), autograph=False, **options)  # noqa: B023
        np.testing.assert_allclose(traced(), eager, atol=1e-6)


def test_distributions():
    normal = draws.normal((100_001,), (3, 4)).numpy()
    assert np.isfinite(normal).all()
    assert normal.mean() == pytest.approx(0.0, abs=0.02)
    assert normal.std() == pytest.approx(1.0, abs=0.01)
    assert np.mean(np.abs(normal) < 1) == pytest.approx(0.6827, abs=0.01)
    uniform = draws.uniform((100_000,), (3, 4)).numpy()
    assert 0 < uniform.min() and uniform.max() < 1
    counts = np.histogram(uniform, 10, (0, 1))[0]
    np.testing.assert_allclose(counts / 1e5, 0.1, atol=0.006)
    for key in ((3, 5), (4, 4)):
        other = draws.normal((100_001,), key).numpy()
        assert abs(np.corrcoef(normal, other)[0, 1]) < 0.02
