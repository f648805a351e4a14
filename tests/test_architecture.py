"""The page on the architecture names files and things that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = re.findall(r"`((?:training|update|backward|hooks)/\w+\.py)`", TEXT)
WALK = TEXT[TEXT.index("## The way of one batch") : TEXT.index("A custom `train_step`")]
NAMES = sorted(set(re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)*)`", TEXT)))
# Words in code type that are no names of this package.
OTHERS = {"fit", "trainable", "gradient_accumulation_steps", "tf.GradientTape"}
ROOMS = {"tuning", "callbacks", "plots", "models", "training", "update", "backward", "hooks"}


@pytest.mark.parametrize("name", FILES)
def test_files_exist(name):
    assert (ROOT / "keras_tapefit" / name).exists()


def test_a_batch_passes_through_a_dozen_files():
    steps = re.findall(r"^\d+\. `(\S+?\.py)`", WALK, flags=re.M)
    assert steps and len(steps) <= 12 and len(set(steps)) == len(steps)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OTHERS | ROOMS | {"gradients"}])
def test_names_exist(name):
    source = "\n".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "keras_tapefit").rglob("*.py")
    )
    last = name.split(".")[-1]
    assert re.search(rf"(?:class|def) {last}\b", source), name
