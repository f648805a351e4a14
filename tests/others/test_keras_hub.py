"""Tasks of KerasHub, small and with random weights, trained on raw strings and images."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_tapefit import TapeModel, hooks

models = pytest.importorskip("keras_hub", exc_type=ImportError).models

pytestmark = [
    pytest.mark.slow,
    # Of KerasHub, and of Keras about KerasHub's `compile`.
    pytest.mark.filterwarnings("ignore::Warning"),
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bad", "film", "good", "very"]
TEXTS = ["a good film", "a very bad film", "the film good", "bad"] * 4
LABELS = [1, 0, 1, 0] * 4
PIXELS = np.random.default_rng(3).uniform(size=(16, 16, 16, 3)).astype("float32")


def _bert():
    return models.BertBackbone(
        vocabulary_size=len(WORDS),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )


def _classifier(cls):
    tokenizer = models.BertTokenizer(vocabulary=WORDS)
    preprocessor = models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return cls(backbone=_bert(), preprocessor=preprocessor, num_classes=2)


def _masked(cls):
    tokenizer = models.BertTokenizer(vocabulary=WORDS)
    preprocessor = models.BertMaskedLMPreprocessor(
        tokenizer, sequence_length=8, mask_selection_length=4, mask_selection_rate=0.5
    )
    return cls(backbone=_bert(), preprocessor=preprocessor)


def _language_model(cls):
    letters = [*"abdefghilmortvy", "\u0120", "ba", "<|endoftext|>"]
    tokenizer = models.GPT2Tokenizer({letter: i for i, letter in enumerate(letters)}, ["b a"])
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8)
    backbone = models.GPT2Backbone(
        vocabulary_size=len(letters),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )
    return cls(backbone=backbone, preprocessor=preprocessor)


def _images(cls):
    # The smallest that there is.
    backbone = models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    return cls(backbone=backbone, num_classes=2)


# A class of KerasHub's, how to make one of it, and what it is trained on.
TASKS = {
    "text classifier": (models.BertTextClassifier, _classifier, (TEXTS, LABELS)),
    "masked language model": (models.BertMaskedLM, _masked, (TEXTS, None)),
    "language model": (models.GPT2CausalLM, _language_model, (TEXTS, None)),
    "image classifier": (models.ResNetImageClassifier, _images, (PIXELS, np.array(LABELS))),
}


def _made(task, way):
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    cls, make, _ = TASKS[task]
    if way == "a class of both":
        return make(type(cls.__name__, (TapeModel, cls), {}))
    model = make(cls)
    return TapeModel.from_model(model) if way == "from_model" else model


def _fit(model, task, epochs=2):
    x, y = TASKS[task][2]
    return model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0).history


def _compile(model, **options):
    # What the masked language model draws is drawn by the data, in any order.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss, weighted_metrics=[], **options)


@pytest.mark.parametrize("way", ["from_model", "a class of both"])
@pytest.mark.parametrize("task", [task for task in TASKS if task != "masked language model"])
def test_without_hooks_it_is_theirs_to_the_bit(task, way):
    results = []
    for each in ("theirs", way):
        model = _made(task, each)
        _compile(model)
        results.append((_fit(model, task), model.get_weights()))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("way", ["from_model", "a class of both"])
@pytest.mark.parametrize("task", TASKS)
def test_hooks_in_their_fit_saved_and_loaded(task, way, tmp_path):
    model = _made(task, way)
    # Weights move by what the hook leaves of a gradient.
    clipping = hooks.GlobalNormClipping(1e-3)
    _compile(model, gradient_hooks=[hooks.GradientMonitor(), clipping])
    before = model.get_weights()
    history = _fit(model, task, epochs=1)
    assert history["gradient_norm"][0] > 1e-3
    moved = [
        np.ravel(new - old)
        for new, old, variable in zip(model.get_weights(), before, model.weights, strict=True)
        if variable.trainable
    ]
    steps = len(TEXTS) // 4
    assert 0 < np.linalg.norm(np.concatenate(moved)) <= steps * 0.1 * 1e-3 * 1.01

    model.save(tmp_path / "task.keras")
    with keras.saving.custom_object_scope({type(model).__name__: type(model)}):
        loaded = keras.models.load_model(tmp_path / "task.keras")
    assert isinstance(loaded, TapeModel) and isinstance(loaded, TASKS[task][0])
    assert [hook.get_config() for hook in loaded.gradient_hooks] == [
        hook.get_config() for hook in model.gradient_hooks
    ]
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # KerasHub's classes compile themselves where they are made, and so does what is loaded.
    assert "gradient_norm" in _fit(loaded, task, epochs=1)
    _compile(loaded)
    assert "gradient_norm" in _fit(loaded, task, epochs=1)


def test_micro_batches_of_strings():
    results = []
    for parts in (1, 2):
        model = _made("text classifier", "from_model")
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        _compile(model, micro_batches=parts)
        results.append(_fit(model, "text classifier")["loss"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_adapters_are_all_that_is_trained():
    source = _made("text classifier", "theirs")
    source.backbone.enable_lora(2)
    model = TapeModel.from_model(source)
    monitor = hooks.GradientMonitor(per_variable=True)
    _compile(model, gradient_hooks=[monitor])
    history = _fit(model, "text classifier")
    named = {name for name in history if name.startswith("gradient_norm/")}
    assert any("lora" in name for name in named)
    assert len(named) == len(source.trainable_variables) < len(model.weights)


def test_text_is_generated_with_what_was_trained(tmp_path):
    model = _made("language model", "from_model")
    model.compile(
        optimizer=keras.optimizers.Adam(0.05),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
        jit_compile=False,
        gradient_hooks=[hooks.GlobalNormClipping(1.0)],
    )
    model.fit(["bad film"] * 16, batch_size=4, epochs=30, verbose=0)
    assert model.generate("ba", max_length=6).startswith("bad")
    # The model that it was made of has the same weights, and can be kept as a preset.
    source = _made("language model", "theirs")
    TapeModel.from_model(source).save_weights(tmp_path / "some.weights.h5")
    source.save_to_preset(tmp_path / "preset")
    again = models.CausalLM.from_preset(str(tmp_path / "preset"))
    for a, b in zip(again.get_weights(), source.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_block_on_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "fine_tune_and_freeze.md").read_text("utf-8")
    code, expected = re.findall(r"```py\n(.*?)```\n\n```text\n(.*?)```", page, re.S)[-1]
    exec(compile(code, "fine_tune_and_freeze.md", "exec"), {})
    assert capsys.readouterr().out == expected
