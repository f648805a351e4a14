"""Targets: every kind selects what it says, and one that selects nothing is an error."""

import keras
import pytest
import tensorflow as tf

from keras_tapefit.gradients import deserialize_targets, matching, serialize_targets, variable_path


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, name="encoder_1")(inputs)
    hidden = keras.layers.Dense(4, name="encoder_2", use_bias=False)(hidden)
    return keras.Model(inputs, keras.layers.Dense(1, name="head")(hidden))


def _is_bias(variable):
    return variable.name == "bias"


KINDS = {
    "all": (lambda m: None, [0, 1, 2, 3, 4]),
    "layer": (lambda m: m.get_layer("head"), [3, 4]),
    "variable": (lambda m: m.get_layer("encoder_1").bias, [1]),
    "native variable": (lambda m: m.get_layer("encoder_1").bias.value, [1]),
    "model": (lambda m: m, [0, 1, 2, 3, 4]),
    "glob": (lambda m: "encoder*", [0, 1, 2]),
    "glob on the end": (lambda m: "*/bias", [1, 4]),
    "exact path": (lambda m: "head/kernel", [3]),
    "predicate": (lambda m: _is_bias, [1, 4]),
    "list": (lambda m: ["head/*", m.get_layer("encoder_1"), "*/bias"], [0, 1, 3, 4]),
    "tuple": (lambda m: ("head/bias", "head/kernel"), [3, 4]),
    "empty list": (lambda m: [], []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(model, kind):
    make, expected = KINDS[kind]
    assert matching(make(model), model.trainable_variables) == expected


def test_globs_are_case_sensitive(model):
    with pytest.raises(ValueError, match="'HEAD/\\*' matches no variable"):
        matching("HEAD/*", model.trainable_variables)


NOTHING = {
    "glob": (lambda: "decoder/*", r"The target 'decoder/\*' matches no variable"),
    "predicate": (lambda: lambda v: False, "The target <function .* matches no variable"),
    "layer": (lambda: keras.layers.Dense(1, name="other"), "layer 'other' matches no variable"),
    "variable": (lambda: keras.Variable(1.0, name="x"), "variable 'x' matches no variable"),
    "one of a list": (lambda: ["head/*", "decoder/*"], r"The target 'decoder/\*' matches"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_target_must_match_and_the_paths_are_listed(model, kind):
    make, text = NOTHING[kind]
    with pytest.raises(ValueError, match=text) as caught:
        matching(make(), model.trainable_variables)
    for variable in model.trainable_variables:
        assert f"\n  {variable.path}" in str(caught.value)


@pytest.mark.parametrize("wrong", [3, 0.5, object(), ["head/*", 3], b"head"])
def test_unknown_kinds(model, wrong):
    with pytest.raises(TypeError, match="`targets` must be a layer, .* list of these. Received:"):
        matching(wrong, model.trainable_variables)


def test_no_variables_at_all():
    with pytest.raises(ValueError, match=r"paths there are:\n  \(none\)"):
        matching("*", [])


def test_a_bare_variable_has_a_path():
    assert variable_path(tf.Variable(1.0, name="slope")) == "slope"
    assert matching("slope", [tf.Variable(1.0, name="slope")]) == [0]


@keras.saving.register_keras_serializable("tests")
def is_kernel(variable):
    return variable.name == "kernel"


SAVED = {name: make for name, (make, _) in KINDS.items() if name != "predicate"}
SAVED["registered predicate"] = lambda m: is_kernel


@pytest.mark.parametrize("kind", SAVED)
def test_saved_and_loaded_targets_select_the_same(model, kind):
    variables = model.trainable_variables
    targets = SAVED[kind](model)
    config = serialize_targets(targets, variables)
    restored = deserialize_targets(config)
    assert matching(restored, variables) == matching(targets, variables)
    assert serialize_targets(restored, variables) == config


def test_saved_layers_survive_other_automatic_names(model):
    config = serialize_targets(model.get_layer("head"), model.trainable_variables)
    renamed = [
        keras.Variable(v.numpy(), name=f"renamed_{i}")
        for i, v in enumerate(model.trainable_variables)
    ]
    assert matching(deserialize_targets(config), renamed) == [3, 4]


def test_layers_cannot_be_saved_before_the_model_is_built(model):
    with pytest.raises(ValueError, match="layer 'head' can be saved only after the model is built"):
        serialize_targets(model.get_layer("head"), None)


@pytest.fixture(scope="module")
def backbone():
    """Layers with weights, without, with none that is ever trained, and with seeds only."""
    inputs = keras.Input((4,))
    x = keras.layers.Normalization(name="scale")(inputs)
    x = keras.layers.Dense(3, name="one")(keras.layers.Rescaling(2.0)(x))
    x = keras.layers.BatchNormalization(name="norm")(keras.layers.Dropout(0.5)(x))
    inner = keras.Sequential([keras.Input((3,)), keras.layers.ReLU()], name="inner")
    return keras.Model(inputs, keras.layers.Dense(2, name="two")(inner(x)))


@pytest.mark.parametrize("is_frozen", [False, True])
def test_lists_of_layers_may_hold_some_without_weights(backbone, is_frozen):
    variables = backbone.trainable_variables
    backbone.trainable = not is_frozen
    try:
        assert matching(backbone.layers, variables) == list(range(6))
        assert matching(backbone.layers[-4:], variables) == [2, 3, 4, 5]
        for none in (["scale"], ["dropout", "re_lu"]):
            layers = [v for v in backbone.layers if v.name.startswith(tuple(none))]
            with pytest.raises(ValueError, match="layer '.*' matches no variable"):
                matching(layers, variables)
        with pytest.raises(ValueError, match="layer 'scale' matches no variable"):
            matching(backbone.get_layer("scale"), variables)
        other = keras.layers.Dense(2, name="elsewhere", trainable=not is_frozen)
        other.build((None, 2))
        with pytest.raises(ValueError, match="layer 'elsewhere' matches no variable"):
            matching([*backbone.layers, other], variables)
        with pytest.raises(ValueError, match="'tow/\\*' matches no variable"):
            matching([*backbone.layers, "tow/*"], variables)
    finally:
        backbone.trainable = True


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("head", "head/*"),
        ("head/", "head/*"),
        ("kernel", "*/kernel"),
        ("encoder", "encoder*"),
        ("coder", "*coder*"),
    ],
)
def test_a_name_without_a_star_is_told_the_glob(model, given, meant):
    with pytest.raises(ValueError) as caught:
        matching(given, model.trainable_variables)
    assert f"matches no variable. Did you mean {meant!r}?" in str(caught.value)
    assert matching(meant, model.trainable_variables)


def test_no_glob_is_made_up(model):
    with pytest.raises(ValueError) as caught:
        matching("decoder", model.trainable_variables)
    assert "Did you mean" not in str(caught.value)
