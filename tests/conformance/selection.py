"""Which of Keras's test files are run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .rewrite import rewrite

# Files that the rule below finds and that are not run, with the reason. Paths, or how
# they begin, below keras/src.
DROPPED = {
    "backend/jax/": "for another backend",
    "export/litert": "needs a LiteRT exporter, or is skipped",
    "export/onnx_test.py": "needs an ONNX exporter, which does not install with TensorFlow",
    "export/openvino_test.py": "needs OpenVINO, or is skipped",
    "export/torch_test.py": "for another backend",
    "utils/jax_layer_test.py": "needs JAX, and tests a layer",
    "utils/torch_utils_test.py": "for another backend",
    "ops/core_test.py": "thousands of tests of functions; a handful make a model, in passing",
    "ops/nn_test.py": "as ops/core_test.py",
    "ops/numpy_test.py": "as ops/core_test.py",
    "quantizers/gptq_test.py": "minutes of quantization; awq_test.py uses models the same way",
}


def site_packages() -> Path:
    """Returns the folder that Keras is installed in, without importing Keras."""
    spec = importlib.util.find_spec("keras")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("Keras is not installed.")
    return Path(spec.origin).parent.parent


def test_files() -> list[Path]:
    """Returns the test files in which our classes have a part, in order.

    That is so where the rewrite changes anything, and where `run_layer_test` is called:
    it trains the layer inside a model.
    """
    source = site_packages() / "keras" / "src"
    found = []
    for path in sorted(source.glob("**/*_test.py")):
        if path.relative_to(source).as_posix().startswith(tuple(DROPPED)):
            continue
        text = path.read_text(encoding="utf-8")
        if "run_layer_test" in text or rewrite(text)[1]:
            found.append(path)
    return found
