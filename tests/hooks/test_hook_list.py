"""The list of hooks: by index and name, changed at will, and its handles."""

import numpy as np
import pytest

from keras_tapefit import TapeSequential, hooks

X, Y = np.array([[3.0, 4.0]]), np.array([[0.0]])


@pytest.fixture
def three(line):
    line.gradient_hooks.set(
        [
            hooks.GlobalNormClipping(1.0),
            hooks.GradientScaling(2.0, name="double"),
            hooks.GlobalNormClipping(3.0),
        ]
    )
    return line.gradient_hooks


def _names(hook_list):
    return [hook.name for hook in hook_list]


def _seen(model):
    """The gradient that the optimizer saw; the true one is `[42, 56]`, of norm 70."""
    model.set_weights([np.ones((2, 1))])
    model.train_on_batch(X, Y)
    return (1 - model.get_weights()[0]).ravel()


def test_default_names():
    names = {
        "BlockRMSClipping": "block_rms_clipping",
        "ZScoreClipping": "z_score_clipping",
        "GlobalNormClipping": "global_norm_clipping",
        "LambdaHook": "lambda_hook",
    }
    for name, expected in names.items():
        assert getattr(hooks, name)._default_name() == expected


def test_by_index_and_name(three):
    assert _names(three) == ["global_norm_clipping", "double", "global_norm_clipping_1"]
    assert three[1] is three["double"] and three[-1] is three["global_norm_clipping_1"]
    assert three[:2] == [three[0], three[1]]
    assert len(three) == 3 and "double" in three and three[0] in three and "x" not in three
    assert three.index(three[1]) == 1
    with pytest.raises(KeyError, match="No hook 'x'. The hooks are: 'global_norm_clipping', 'dou"):
        three["x"]
    with pytest.raises(KeyError, match="No hook 'x'"):
        three.remove("x")
    with pytest.raises(IndexError):
        three[3]


def test_add_insert_remove_replace(three):
    first = three[0]
    value = three.add(hooks.ValueClipping(1.0), index=0)
    assert three[0] is value
    three.remove("double")
    three.remove(first)
    assert _names(three) == ["value_clipping", "global_norm_clipping_1"]
    noise = three.replace("value_clipping", hooks.GradientNoise(0.1))
    assert _names(three) == ["gradient_noise", "global_norm_clipping_1"]
    three.append(lambda g, v: g)
    assert three.pop().name == "lambda_hook"
    three.extend([hooks.GradientMonitor(), first])
    assert _names(three)[2:] == ["gradient_monitor", "global_norm_clipping"]
    del three[0], three["gradient_monitor"]
    assert noise not in three
    three.clear()
    assert list(three) == []


def test_reordering_keeps_names_and_slices_replace(three):
    before = list(three)
    three[:] = three[::-1]
    assert list(three) == before[::-1]
    assert [h.name for h in before] == ["global_norm_clipping", "double", "global_norm_clipping_1"]
    three.reverse()
    assert list(three) == before
    three[1:] = [hooks.ValueClipping(1.0)]
    assert _names(three) == ["global_norm_clipping", "value_clipping"]
    three["value_clipping"] = before[1]
    assert _names(three) == ["global_norm_clipping", "double"]
    three[0] = before[0]
    assert three[0] is before[0]


def test_a_refused_change_leaves_the_list_as_it_was(three):
    before, names = list(three), _names(three)
    other = TapeSequential().gradient_hooks
    foreign = other.add(hooks.ValueClipping(1.0))
    with pytest.raises(ValueError, match="can be in the list of hooks only once"):
        three[:] = [three[0], three[0]]
    with pytest.raises(ValueError, match="There is a hook named 'double' already"):
        three.add(hooks.ValueClipping(1.0, name="double"))
    with pytest.raises(ValueError, match="There is a hook named 'same' already"):
        three.set([hooks.ValueClipping(1, name="same"), hooks.ValueClipping(2, name="same")])
    with pytest.raises(ValueError, match="belongs to a model already. Remove it there first"):
        three.add(foreign)
    with pytest.raises(ValueError, match="belongs to another model already"):
        three.set([before[0], foreign])
    with pytest.raises(ValueError, match="belongs to a model already"):
        three[0] = foreign
    with pytest.raises(ValueError, match="belongs to a model already"):
        three.append(before[1])
    assert list(three) == before and _names(three) == names
    assert foreign in other


WRONG = [
    (hooks.ValueClipping, r"Did you mean `ValueClipping\(...\)`\? Received: <class"),
    ("clip", "must be a `GradientHook` or a function .*Received: 'clip'"),
    (None, "Received: None"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG)
def test_what_is_no_hook(three, line, wrong, text):
    for add in (
        three.append,
        three.add,
        line.register_gradient_hook,
        lambda hook: three.set([hook]),
        lambda hook: three.replace(0, hook),
    ):
        with pytest.raises(TypeError, match=text):
            add(wrong)


@pytest.mark.parametrize("wrong", [hooks.ValueClipping(1.0), {"a": 1}, "clip", 3])
def test_what_is_no_list(line, wrong):
    for put in (line.gradient_hooks.set, lambda v: line.compile(gradient_hooks=v)):
        with pytest.raises(TypeError, match="`gradient_hooks` must be a list of gradient hooks"):
            put(wrong)


def test_compile_keeps_and_clears(line):
    line.compile("sgd", "mse", gradient_hooks=[hooks.GradientMonitor()])
    line.compile("sgd", "mse")
    assert _names(line.gradient_hooks) == ["gradient_monitor"]
    line.compile("sgd", "mse", gradient_hooks=(hooks.ValueClipping(1.0),))
    assert _names(line.gradient_hooks) == ["value_clipping"]
    line.compile("sgd", "mse", gradient_hooks=[])
    assert len(line.gradient_hooks) == 0


def test_changes_take_effect_in_the_next_step(line):
    np.testing.assert_allclose(_seen(line), [42, 56])
    clip = line.gradient_hooks.add(hooks.GlobalNormClipping(5.0))
    np.testing.assert_allclose(_seen(line), [3, 4], rtol=1e-6)
    line.gradient_hooks.add(hooks.GradientScaling(2.0))
    np.testing.assert_allclose(_seen(line), [6, 8], rtol=1e-6)
    line.gradient_hooks.reverse()
    np.testing.assert_allclose(_seen(line), [3, 4], rtol=1e-6)
    clip.max_norm = 10.0
    np.testing.assert_allclose(_seen(line), [6, 8], rtol=1e-6)
    line.gradient_hooks.replace(clip, hooks.ValueClipping(1.0))
    np.testing.assert_allclose(_seen(line), [1, 1], rtol=1e-6)
    line.gradient_hooks = []
    np.testing.assert_allclose(_seen(line), [42, 56])


def test_handles(line):
    handle = line.register_gradient_hook(hooks.ValueClipping(1.0), name="clip")
    assert handle.hook is line.gradient_hooks["clip"]
    handle.remove()
    handle.remove()
    assert len(line.gradient_hooks) == 0
    with line.register_gradient_hook(lambda g, v: g * 0.5) as handle:
        np.testing.assert_allclose(_seen(line), [21, 28])
        assert handle.hook in line.gradient_hooks
    np.testing.assert_allclose(_seen(line), [42, 56])
    with pytest.raises(ZeroDivisionError), line.register_gradient_hook(hooks.GradientMonitor()):
        raise ZeroDivisionError
    assert len(line.gradient_hooks) == 0
    line.register_gradient_hook(handle.hook).remove()


def test_register_checks_its_arguments(two_layers):
    register = two_layers.register_gradient_hook
    with pytest.raises(ValueError, match=r"'third/\*' matches no variable") as caught:
        register(hooks.GradientMonitor(), targets="third/*")
    assert "\n  first/kernel" in str(caught.value)
    with pytest.raises(ValueError, match="has `targets` of its own. Pass them in one place only"):
        register(hooks.GradientMonitor(targets="first/*"), targets="first/*")
    with pytest.raises(TypeError, match="`name` must be a string. Received: name=3"):
        register(hooks.GradientMonitor(), name=3)
    with pytest.raises(TypeError, match="`targets` must be a layer"):
        register(hooks.GradientMonitor(), targets=3)
    assert len(two_layers.gradient_hooks) == 0
    handle = register(hooks.GradientMonitor(), targets="first/*", name="first")
    assert handle.hook.targets == "first/*" and handle.hook.name == "first"
    with pytest.raises(ValueError, match="There is a hook named 'first' already"):
        register(hooks.GradientMonitor(), name="first")
