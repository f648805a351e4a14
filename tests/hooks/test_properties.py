"""What holds for any gradients and any valid arguments, tried on drawn ones.

Oracles are NumPy in long double.
"""

import copy
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_tapefit import Gradients, hooks
from keras_tapefit.gradients import matching
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.gradients.units import Unit
from keras_tapefit.hooks.step import Step

# The same examples in every run: a failure is somebody's change, not luck.
few = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Of float32 and float64, from the smallest float to the largest.
EXPONENTS = {"float32": (-149, 127), "float64": (-1070, 1023), "float16": (-24, 15)}
SHAPES = [(), (1,), (3,), (4, 2), (2, 3, 2), (0,), (3, 0)]


@st.composite
def tensors(draw, dtypes=("float32", "float64")):
    """One variable and its gradient: dense, sparse with repeated rows, or None."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.sampled_from(SHAPES))
    kind = draw(st.sampled_from(["dense", "dense", "sparse", "none", "zero"]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    exponent = draw(st.one_of(st.integers(-12, 12), st.integers(*EXPONENTS[dtype])))
    spread = draw(st.sampled_from([0, 0, 8, 200]))
    low, high = EXPONENTS[dtype]

    def array(of):
        exponents = np.clip(exponent - rng.integers(0, spread + 1, of), low, high - 1)
        values = np.ldexp(rng.uniform(1, 2, of) * rng.choice([-1, 1], of), exponents)
        return np.asarray(values * (kind != "zero"), dtype)

    variable = keras.Variable(np.ones(shape), dtype=dtype, trainable=True)
    if kind == "none":
        return None, variable
    if kind == "sparse" and len(shape) > 1 and shape[0] > 1:
        rows = array((3, *shape[1:])) / 4
        indices = tf.constant(rng.integers(0, shape[0], 3))
        return tf.IndexedSlices(tf.constant(rows), indices, tf.constant(shape)), variable
    return tf.constant(array(shape)), variable


trees = st.lists(tensors(), min_size=1, max_size=4)


def prepared(*hook_list, variables):
    made = hooks.HookList(hook_list)
    whole = {id(v): Unit(tuple(range(len(v.shape)))) for v in variables}
    owners = {id(v): i // 2 for i, v in enumerate(variables)}
    made.prepare(variables, lambda v: whole[id(v)], lambda v: owners[id(v)])
    return made


def run(hook_list, pairs, index=0):
    gradients = Gradients(pairs).with_unique_rows()
    return hook_list.run(gradients, Step(index=tf.constant(index, tf.int64)))


def wide(gradient):
    """A gradient of many digits, dense; duplicate rows summed as the library sums them."""
    return None if gradient is None else np.asarray(to_dense(gradient)).astype(np.longdouble)


def norm(arrays):
    """Through the largest element: the square of a huge one is too large for a long double."""
    flat = [np.abs(a).ravel() for a in arrays if a is not None]
    flat = np.concatenate(flat) if flat else np.zeros(0)
    largest = flat.max(initial=0)
    return largest * np.sqrt(np.sum((flat / largest) ** 2)) if largest > 0 else largest


def places(kind, arrays):
    """Which gradients are clipped together."""
    everything = range(len(arrays))
    if kind == "global":
        return [list(everything)]
    if kind == "layer":
        return [[i for i in everything if i // 2 == j] for j in range(2)]
    return [[i] for i in everything]


CLIPS = {
    "global": (hooks.GlobalNormClipping, lambda a: 1.0),
    "each": (hooks.NormClipping, lambda a: 1.0),
    "layer": (lambda c: hooks.NormClipping(c, per_layer=True), lambda a: 1.0),
    "block": (hooks.BlockRMSClipping, lambda a: math.sqrt(max(a.size, 1))),
    "adaptive": (hooks.AdaptiveClipping, lambda a: max(math.sqrt(a.size), 1e-3)),
}
BOUNDS = st.one_of(
    st.sampled_from([1.0, 0.5, 3e38, math.inf, 1e39, 1e-30]),
    st.integers(-90, 120).map(lambda e: 2.0**e),
)


@pytest.mark.parametrize("kind", CLIPS)
@few
@given(pairs=trees, bound=BOUNDS)
def test_clipping_by_norms(kind, pairs, bound):
    make, per = CLIPS[kind]
    variables = [v for _, v in pairs]
    hook_list = prepared(make(bound), variables=variables)
    given_arrays = [wide(g) for g in Gradients(pairs).with_unique_rows().values()]
    clipped = run(hook_list, pairs)
    results = [wide(g) for g in clipped.values()]
    twice = [wide(g) for g in run(hook_list, clipped.pairs()).values()]
    for place in places(kind, given_arrays):
        before, after = ([a[i] for i in place] for a in (given_arrays, results))
        present = [a for a in before if a is not None]
        assert [a is None for a in before] == [a is None for a in after]
        if not present:
            continue
        length = norm(before)
        # What lies below the smallest normal float is 0 on most devices.
        tiny = max(np.finfo(variables[i].dtype).tiny for i in place)
        limit = np.longdouble(bound) * per(present[0])
        factor = min(np.longdouble(1), limit / length) if length > tiny else np.longdouble(1)
        for i, a, b in zip(place, before, after, strict=True):
            if a is None:
                continue
            assert np.isfinite(b).all()
            assert (np.abs(b) <= np.abs(a) * (1 + 1e-6)).all()
            if factor == 1:
                np.testing.assert_allclose(b, a, rtol=1e-6)
            else:
                np.testing.assert_allclose(b, a * factor, rtol=1e-5, atol=4 * tiny)
            if np.abs(a).max(initial=0) * factor > 4 * tiny:
                assert b.any()
            np.testing.assert_allclose(twice[i], b, rtol=1e-5, atol=4 * tiny)
    for gradient, (original, _) in zip(clipped.values(), pairs, strict=True):
        # Where the whole variable is one unit, `AdaptiveClipping` makes it dense.
        assert kind == "adaptive" or isinstance(gradient, type(original))


@few
@given(pairs=trees, bound=BOUNDS)
def test_clipping_by_value(pairs, bound):
    hook_list = prepared(hooks.ValueClipping(bound), variables=[v for _, v in pairs])
    unique = Gradients(pairs).with_unique_rows()
    for a, b, v in zip(
        unique.values(), run(hook_list, pairs).values(), unique.variables, strict=True
    ):
        if a is not None:
            # At a bound that the type holds.
            limit = min(bound, float(np.finfo(v.dtype).max))
            tiny = np.finfo(v.dtype).tiny
            np.testing.assert_allclose(
                wide(b), np.clip(wide(a), -limit, limit), rtol=1e-6, atol=tiny
            )
            assert wide(b).any() == wide(a).any() and np.isfinite(wide(b)).all()


@few
@given(data=st.data(), steps=st.integers(1, 5))
def test_clips_that_learn_never_lengthen_nor_break(data, steps):
    first = data.draw(trees)
    variables = [v for _, v in first]
    made = [
        prepared(hooks.PercentileClipping(data.draw(st.integers(0, 100)), 3), variables=variables),
        prepared(hooks.ZScoreClipping(0.5, 0.5, 2), variables=variables),
    ]
    for step in range(steps):
        factor = data.draw(st.sampled_from([0.0, 1.0, 1e-3, 1.0]))
        pairs = [(None if g is None else tf.cast(factor, v.dtype) * to_dense(g), v)
                 for g, v in first]  # fmt: skip
        for hook_list in made:
            for (a, _), b in zip(pairs, run(hook_list, pairs, step).values(), strict=True):
                if a is None:
                    assert b is None
                    continue
                before, after = wide(a), wide(b)
                assert np.isfinite(after).all()
                assert (np.abs(after) <= np.abs(before) * (1 + 1e-6)).all()
            for variable in hook_list[0].variables:
                assert np.isfinite(variable.numpy()).all()
    for hook_list in made:
        whole = norm([wide(g) for g, _ in pairs])
        if whole > 1e-30:
            assert norm([wide(g) for g in run(hook_list, pairs, steps).values()]) > 0


SIMPLE = [
    lambda: hooks.GlobalNormClipping(0.5),
    lambda: hooks.NormClipping(0.25, targets=lambda v: v.dtype == "float32"),
    lambda: hooks.ValueClipping(0.125),
    lambda: hooks.BlockRMSClipping(0.1),
    lambda: hooks.AdaptiveClipping(0.1),
    lambda: hooks.GradientScaling(-3.0),
    lambda: hooks.GradientNoise(0.5, seed=3),
    lambda: hooks.PercentileClipping(30, 3),
    lambda: hooks.ZScoreClipping(1.0, 0.5, 2),
    lambda: hooks.ZeroNonFinite(),
    lambda: hooks.Centralization(),
    lambda: hooks.LambdaHook(lambda g, v: g * g),
    lambda: hooks.GradientMonitor(name="m"),
]


@few
@given(
    trees=st.lists(st.tuples(tensors(("float32",)), tensors()), min_size=1, max_size=1),
    chosen=st.lists(st.integers(0, len(SIMPLE) - 1), max_size=4, unique=True),
    steps=st.integers(1, 3),
)
def test_a_list_is_the_composition_of_its_hooks(trees, chosen, steps):
    pairs = list(trees[0])
    variables = [v for _, v in pairs]
    together = prepared(*(SIMPLE[i]() for i in chosen), variables=variables)
    apart = [prepared(SIMPLE[i](), variables=variables) for i in chosen]
    for step in range(steps):
        expected = pairs
        for hook_list in apart:
            expected = run(hook_list, expected, step).pairs()
        found = run(together, pairs, step).pairs()
        for (a, _), (b, _) in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(wide(a), wide(b))


@few
@given(
    names=st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join),
        min_size=1,
        max_size=8,
        unique=True,
    ),
    groups=st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_targets_partition(names, groups):
    variables = [_named(name) for name in names]
    by_group = {}
    for variable, group in zip(variables, groups, strict=False):
        by_group.setdefault(group, []).append(variable)
    positions = [matching(members, variables) for members in by_group.values()]
    assert sorted(i for group in positions for i in group) == list(range(len(variables)))
    gradients = Gradients([(tf.fill((2,), float(i)), v) for i, v in enumerate(variables)])
    rebuilt = gradients.map(tf.zeros_like)
    for members in by_group.values():
        assert gradients.select(members).variables == members
        rebuilt = rebuilt.updated(gradients.select([v.path for v in members]))
    for a, b in zip(rebuilt.values(), gradients.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    squares = [gradients.select(members).global_norm() ** 2 for members in by_group.values()]
    np.testing.assert_allclose(sum(squares), gradients.global_norm() ** 2, rtol=1e-6)


def _named(path):
    *scopes, name = path.split("/")
    if not scopes:
        return keras.Variable(np.zeros(2), name=name)
    with keras.name_scope(scopes[0]):
        return _scoped(scopes[1:], name)


def _scoped(scopes, name):
    if not scopes:
        return keras.Variable(np.zeros(2), name=name)
    with keras.name_scope(scopes[0]):
        return _scoped(scopes[1:], name)


def halve(gradient, variable):
    return gradient / 2


keras.saving.register_keras_serializable("properties")(halve)
COUNTS = st.integers(1, 1000)
TARGETS = st.one_of(
    st.none(),
    st.sampled_from(["*", "a/*", "*/kernel"]),
    st.lists(st.sampled_from(["a/*", "b/*"]), min_size=1, max_size=2),
)
RANGES = st.one_of(st.none(), COUNTS, st.tuples(st.integers(0, 9), st.integers(10, 99)).map(list))
ARGUMENTS = {
    "targets": TARGETS,
    "name": st.one_of(st.none(), st.text("abc_", min_size=1, max_size=5)),
    "per_layer": st.booleans(),
    "per_variable": st.booleans(),
    "validation": st.booleans(),
    "monitor": st.sampled_from(["gradient_norm", "loss"]),
    "history": COUNTS,
    "num_warmup_steps": COUNTS,
    "patience": COUNTS,
    "every": COUNTS,
    "max_consecutive": st.one_of(st.none(), COUNTS),
    "seed": st.one_of(st.none(), st.integers(-(2**40), 2**40)),
    "epochs": RANGES,
    "stages": st.lists(TARGETS.filter(lambda t: t is not None), min_size=1, max_size=3),
    "fn": st.just(halve),
    "log_clipped": st.booleans(),
    "locate": st.booleans(),
    "layers": st.one_of(st.none(), st.just("a/*"), st.lists(st.text("abc/", min_size=1))),
}
HOOKS = [
    getattr(hooks, name)
    for name in hooks.__all__
    if isinstance(getattr(hooks, name), type)
    and issubclass(getattr(hooks, name), hooks.GradientHook)
    # `During` holds another hook, which is no plain argument.
    and name not in ("GradientHook", "During")
]


def numbers(number):
    low = number.minimum if number.above is None else number.above + 2.0**-100
    floats = st.floats(
        -1e30 if low is None else low,
        1e30 if number.maximum is None else number.maximum,
        allow_subnormal=False,
    )
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 7, 0.9)
    integers = st.integers(1, 1 if number.maximum == 1 else 100)
    return st.one_of(floats, integers, st.just(schedule))


def arguments(cls):
    import inspect

    names = [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "steps")]
    if names == ["args", "kwargs"]:
        names = ["targets", "name"]
    drawn = {}
    for name in names:
        number = getattr(cls, name, None)
        is_number = isinstance(number, hooks.Number)
        drawn[name] = numbers(number) if is_number else ARGUMENTS[name]
    if cls is hooks.Freezing:
        drawn["targets"] = TARGETS.filter(lambda t: t is not None)
    return st.fixed_dictionaries(drawn)


@pytest.mark.parametrize("cls", HOOKS, ids=lambda cls: cls.__name__)
@settings(few, max_examples=25)
@given(data=st.data())
def test_configs_come_back(cls, data):
    given_arguments = data.draw(arguments(cls))
    hook = cls(**given_arguments)
    config = json.loads(json.dumps(hook.get_config()))
    restored = cls.from_config(config)
    assert json.loads(json.dumps(restored.get_config())) == config
    assert restored.get_config().keys() >= given_arguments.keys()
    for name, value in given_arguments.items():
        if name != "name" and not isinstance(
            value, keras.optimizers.schedules.LearningRateSchedule
        ):
            assert getattr(restored, name) == value
    copied = copy.copy(hook)
    assert json.loads(json.dumps(copied.get_config())) == config
    assert type(hook).__name__ in repr(copied)
    (loaded,) = hooks.HookList.deserialize(
        json.loads(json.dumps(hooks.HookList([hook]).serialize()))
    )
    assert json.loads(json.dumps(loaded.get_config())) == config and loaded.name == hook.name
