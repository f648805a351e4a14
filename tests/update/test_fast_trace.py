"""`update_step` traced once a kind of variable: the same weights, bit for bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeModel, hooks
from keras_tapefit.update import copies, fast_trace, optimizers

SHAPES = [(4, 3), (3,), (4, 3), (3,), (3, 4), (), (2, 3, 4), (2, 3, 4)]

ALL = {
    "Adadelta": keras.optimizers.Adadelta,
    "Adafactor": keras.optimizers.Adafactor,
    "Adagrad": keras.optimizers.Adagrad,
    "Adam": keras.optimizers.Adam,
    "Adam amsgrad": lambda: keras.optimizers.Adam(amsgrad=True),
    "Adam schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)
    ),
    "AdamW": keras.optimizers.AdamW,
    "Adamax": keras.optimizers.Adamax,
    "Ftrl": keras.optimizers.Ftrl,
    "Lamb": keras.optimizers.Lamb,
    "Lion": keras.optimizers.Lion,
    "Nadam": keras.optimizers.Nadam,
    "RMSprop": lambda: keras.optimizers.RMSprop(momentum=0.9, centered=True),
    "SGD": keras.optimizers.SGD,
    "SGD momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "SGD average": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=3),
    "clipped": lambda: keras.optimizers.Adam(clipnorm=0.5, weight_decay=0.01),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
}
ALL |= {
    name: getattr(keras.optimizers, name)
    for name in ("Muon", "ScheduleFreeAdamW")
    if hasattr(keras.optimizers, name)
}


def make_variables():
    rng = np.random.default_rng(0)
    return [
        keras.Variable(rng.standard_normal(shape).astype("float32"), name=f"v{i}")
        for i, shape in enumerate(SHAPES)
    ]


def train(optimizer, fast, num_steps=7, sparse=False, jit_compile=False):
    """Returns all values after some steps, and what stood in for `update_step`."""
    variables = make_variables()
    optimizers.build(optimizer, variables)
    seen = []

    @tf.function(autograph=False, jit_compile=jit_compile)
    def step(gradients):
        if sparse:
            first = tf.IndexedSlices(gradients[0][:2], tf.constant([0, 2]), tf.constant([4, 3]))
            gradients = [first, *gradients[1:]]
        leaves = list(optimizers.leaves(optimizer))
        with fast_trace.traced_once(leaves if fast else []):
            seen.extend(leaf.__dict__.get("update_step") for leaf in leaves)
            optimizer.apply(gradients, variables)

    rng = np.random.default_rng(1)
    for _ in range(num_steps):
        step([tf.constant(rng.standard_normal(shape), tf.float32) for shape in SHAPES])
    values = [v.numpy() for v in variables] + [np.asarray(v) for v in optimizer.variables]
    return values, seen[0]


def assert_equal_bitwise(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", ALL)
def test_weights_and_slots_are_stock_keras_bit_for_bit(name):
    fast, used = train(ALL[name](), True)
    stock, _ = train(ALL[name](), False)
    assert_equal_bitwise(fast, stock)
    assert not used._gave_up
    # (4, 3), (3,), (3, 4), () and (2, 3, 4)
    assert len(used._functions) == 5


def test_under_xla_the_weights_are_the_same():
    fast, used = train(keras.optimizers.AdamW(), True, jit_compile=True)
    stock, _ = train(keras.optimizers.AdamW(), False, jit_compile=True)
    assert not used._gave_up
    for left, right in zip(fast, stock, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)


def test_sparse_gradients_are_traced_as_ever():
    fast, used = train(keras.optimizers.Adam(), True, sparse=True)
    stock, _ = train(keras.optimizers.Adam(), False, sparse=True)
    assert_equal_bitwise(fast, stock)
    assert not used._gave_up


class Own(keras.optimizers.SGD):
    """An optimizer of the user's own; `factor` says how it tells variables apart."""

    def build(self, variables):
        super().build(variables)
        self.factors = [1.0 + i for i in range(len(variables))]
        self.by_path = {v.path: 1.0 + i for i, v in enumerate(variables)}
        self.by_place = {i: 1.0 + i for i in range(len(variables))}
        self.nested = {"factors": list(self.factors)} if self.factor is Own.by_nested else None
        self.calls = 0
        self.total = self.add_variable((), name="total")

    def factor(self, variable):
        return 1.0

    def by_list(self, variable):
        return self.factors[self._get_variable_index(variable)]

    def by_name(self, variable):
        return 2.0 if variable.name.startswith("v1") else 1.0

    def by_place_in_dict(self, variable):
        return self.by_place[self._get_variable_index(variable)]

    def by_nested(self, variable):
        return self.nested["factors"][self._get_variable_index(variable)]

    def by_comparison(self, variable):
        return 2.0 if self._get_variable_index(variable) == 0 else 1.0

    def by_count(self, variable):
        self.calls += 1
        return float(self.calls)

    def by_shared_sum(self, variable):
        self.total.assign_add(1.0)
        return self.total.value

    def by_number(self, variable):
        return 1.0 + int(self._get_variable_index(variable))

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.factor(variable), variable, learning_rate)


WAYS = ["by_list", "by_name", "by_place_in_dict", "by_nested", "by_comparison"]
WAYS += ["by_count", "by_shared_sum", "by_number"]


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_tells_variables_apart_is_followed(way):
    def make():
        kind = type("Own", (Own,), {"factor": getattr(Own, way)})
        if way == "by_nested":
            kind.build = with_nested
        return kind(0.1)

    def with_nested(self, variables):
        Own.build(self, variables)
        self.nested = {"factors": list(self.factors)}

    fast, used = train(make(), True)
    stock, _ = train(make(), False)
    assert_equal_bitwise(fast, stock)
    assert used._gave_up == (way != "by_list")


def test_a_user_may_turn_it_off():
    optimizer = keras.optimizers.Adam()
    optimizer.trace_update_once = False
    assert train(optimizer, True)[1] is None


def test_it_leaves_no_trace_on_the_optimizer():
    optimizer = keras.optimizers.Adam()
    train(optimizer, True)
    assert not {"update_step", "_distributed_tf_update_step"} & vars(optimizer).keys()
    assert "_get_variable_index" not in vars(optimizer)


@pytest.mark.parametrize("gated", [False, True])
def test_a_fitted_model_is_stock_keras_bit_for_bit(gated):
    x = np.random.default_rng(0).standard_normal((48, 4)).astype("float32")

    def fitted(cls, **arguments):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        outputs = inputs
        for _ in range(4):
            outputs = keras.layers.Dense(4, "relu", kernel_constraint="unit_norm")(outputs)
        model = cls(inputs, keras.layers.Dense(1)(outputs))
        model.compile(keras.optimizers.AdamW(), "mse", jit_compile=False, **arguments)
        model.fit(x, x[:, :1], epochs=3, batch_size=16, verbose=0)
        return [*model.get_weights(), *map(np.asarray, model.optimizer.variables)]

    arguments = {"gradient_hooks": [hooks.SkipNonFinite()]} if gated else {}
    assert_equal_bitwise(fitted(TapeModel, **arguments), fitted(keras.Model))


def test_the_private_names_of_keras_are_as_expected():
    optimizer = keras.optimizers.Adam()
    variables = make_variables()
    optimizer.build(variables)
    assert len(optimizer._trainable_variables_indices) == len(variables)
    assert optimizer._get_variable_index(variables[3].value) == 3
    assert isinstance(optimizer._variables, list)
    seen = []
    optimizer.__dict__["update_step"] = lambda *arguments: seen.append(arguments)
    optimizer.apply([tf.zeros(shape) for shape in SHAPES])
    assert all(v.value is given for v, (_, given, _) in zip(variables, seen, strict=True))
    assert all(isinstance(given, tf.Variable) for _, given, _ in seen)


def test_all_copies_of_an_apply_are_imported_at_once(monkeypatch):
    """Each import looks at all nodes of the graph: one by one they take quadratic time."""
    imports = []
    make = copies.Copies.make

    def counted(self):
        imports.append(sum(len(m) for _, m in self._waiting.values()))
        make(self)

    monkeypatch.setattr(copies.Copies, "make", counted)
    train(keras.optimizers.Adam(), True, num_steps=1)
    assert imports == [len(SHAPES)]


class Program(keras.optimizers.Optimizer):
    """An optimizer whose update is made up at random, of operations on each element."""

    def __init__(self, seed):
        super().__init__(0.1)
        self.seed = seed

    def build(self, variables):
        super().build(variables)
        self.firsts = [self.add_variable_from_reference(v, "first") for v in variables]
        self.seconds = [self.add_variable_from_reference(v, "second") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        rng = np.random.default_rng(self.seed)
        index = self._get_variable_index(variable)
        held = [variable, self.firsts[index], self.seconds[index]]
        values = [gradient]

        def pick():
            read = rng.integers(3)
            return values[rng.integers(len(values))] if rng.random() < 0.6 else held[read] + 0.0

        for _ in range(10):
            a, b, c = pick(), pick(), [learning_rate, 0.9, 0.1, 1.5][rng.integers(4)]
            made = [
                lambda a, b, c: a + b,
                lambda a, b, c: a - b,
                # Of a longer product TensorFlow takes the factors in any order.
                lambda a, b, c: keras.ops.clip(a, -3.0, 3.0) * c,
                lambda a, b, c: keras.ops.clip(a, -3.0, 3.0) * keras.ops.clip(b, -3.0, 3.0),
                lambda a, b, c: a / (keras.ops.absolute(b) + 1.0),
                lambda a, b, c: keras.ops.sqrt(keras.ops.absolute(a)) + c,
                lambda a, b, c: keras.ops.maximum(a, b),
                lambda a, b, c: keras.ops.clip(a, -1.0, 1.0),
            ][rng.integers(8)](a, b, c)
            values.append(keras.ops.convert_to_tensor(made))
            if rng.random() < 0.6:
                write = [self.assign, self.assign_add, self.assign_sub][rng.integers(3)]
                write(held[rng.integers(3)], keras.ops.clip(pick(), -2.0, 2.0))
        self.assign_sub(variable, keras.ops.clip(values[-1], -3.0, 3.0) * learning_rate)


@pytest.fixture
def joints(monkeypatch):
    """The number of variables in each copy that several share."""
    found = []
    add = copies._Joint.add

    def noted(self):
        found.append(len(self._members))
        add(self)

    monkeypatch.setattr(copies._Joint, "add", noted)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_small_variables_share_operations_bit_for_bit(seed, joints):
    fast, used = train(Program(seed), True, num_steps=3)
    stock, _ = train(Program(seed), False, num_steps=3)
    assert_equal_bitwise(fast, stock)
    assert not used._gave_up
    # (4, 3) twice, (3,) twice, (2, 3, 4) twice; () and (3, 4) have none like them.
    assert joints == [2, 2, 2]


class SharedSlot(Program):
    """An optimizer that keeps one slot for all variables of a shape."""

    def build(self, variables):
        super().build(variables)
        by_shape = {}
        self.firsts = [
            by_shape.setdefault(tuple(v.shape), first)
            for v, first in zip(variables, self.firsts, strict=True)
        ]


def test_a_slot_that_variables_share_is_followed(joints):
    fast, used = train(SharedSlot(0), True, num_steps=3)
    stock, _ = train(SharedSlot(0), False, num_steps=3)
    assert_equal_bitwise(fast, stock)
    assert used._gave_up
    assert not joints


def test_variables_are_joined_up_to_a_number_of_elements(joints, monkeypatch):
    monkeypatch.setattr(copies, "_ROOM", 30)
    monkeypatch.setattr(copies, "_SMALL", 20)
    fast, _ = train(keras.optimizers.Adam(), True)
    stock, _ = train(keras.optimizers.Adam(), False)
    assert_equal_bitwise(fast, stock)
    # 24 elements are too many for one, and 2 · 12 for the room that 3 + 3 leave.
    assert joints == [2, 2]


@pytest.mark.parametrize("name", ["Lamb", "Adafactor", "RMSprop", "Adagrad", "Muon", "Ftrl"])
def test_an_update_that_needs_its_variable_whole_is_not_shared(name, joints):
    """Norms and means are over one variable; reciprocal roots do not round exactly."""
    fast, _ = train(ALL[name](), True)
    stock, _ = train(ALL[name](), False)
    assert_equal_bitwise(fast, stock)
    # Muon updates all but matrices as Adam does.
    assert joints == ([2, 2] if name == "Muon" else [])


@pytest.mark.parametrize(
    ("make", "shared"),
    [
        (lambda: keras.optimizers.SGD(0.3, global_clipnorm=0.1), False),
        (lambda: keras.optimizers.SGD(0.3, momentum=0.9, clipnorm=0.1), False),
        (lambda: keras.optimizers.SGD(0.3, clipvalue=0.1), True),
        (lambda: keras.optimizers.Adam(global_clipnorm=0.1), True),
        (lambda: keras.optimizers.AdamW(clipnorm=0.1), True),
        (lambda: keras.optimizers.Lion(global_clipnorm=0.1), False),
    ],
)
def test_a_product_that_is_multiplied_again_is_not_shared(make, shared, joints):
    """TensorFlow multiplies scalars first, which another operation between prevents."""
    fast, _ = train(make(), True)
    stock, _ = train(make(), False)
    assert_equal_bitwise(fast, stock)
    assert bool(joints) == shared


def test_a_model_in_half_precision_is_stock_keras_bit_for_bit(joints):
    x = np.random.default_rng(0).standard_normal((48, 4)).astype("float32")

    def fitted(cls):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        outputs = inputs
        for _ in range(3):
            outputs = keras.layers.Dense(
                4, "tanh", kernel_regularizer="l2", dtype="mixed_bfloat16"
            )(outputs)
        model = cls(inputs, keras.layers.Dense(1)(outputs))
        model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
        model.fit(x, x[:, :1], epochs=3, batch_size=16, verbose=0)
        return model.get_weights()

    assert_equal_bitwise(fitted(TapeModel), fitted(keras.Model))
    assert joints


def test_gradients_may_be_constants_from_outside(joints):
    """As a custom step may make them."""
    gradients = [tf.ones(shape) for shape in SHAPES]

    def train_once(fast):
        optimizer, variables = keras.optimizers.SGD(0.1), make_variables()
        optimizers.build(optimizer, variables)

        @tf.function(autograph=False)
        def step():
            with fast_trace.traced_once([optimizer] if fast else []):
                optimizer.apply(gradients, variables)

        step()
        return [v.numpy() for v in variables]

    assert_equal_bitwise(train_once(True), train_once(False))
    assert joints


def test_variables_on_different_devices_are_not_shared():
    shape, template = tf.TensorShape([3]), object()
    waiting = copies.Copies()
    for device in ("/device:CPU:0", "/device:GPU:0", "/device:CPU:0", None, None):
        waiting.add(template, {}, shape, device)
    assert [len(members) for _, members in waiting._waiting.values()] == [2, 1, 1, 1]


class SumOfSums(Program):
    """An optimizer that adds to what it has added to."""

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        first, second = self.firsts[index], self.seconds[index]
        self.assign(second, keras.ops.maximum(first, -9.0))
        self.assign_add(first, keras.ops.maximum(gradient, -9.0))
        self.assign_sub(variable, keras.ops.add(keras.ops.abs(gradient), first))


def test_a_sum_is_not_taken_apart(joints):
    """TensorFlow may add terms of the same shape in another order."""
    fast, _ = train(SumOfSums(0), True)
    stock, _ = train(SumOfSums(0), False)
    assert_equal_bitwise(fast, stock)
    assert joints


@pytest.mark.parametrize("name", ["Adam", "SGD momentum"])
def test_gradients_that_hang_together_stay_as_they_are(name, joints):
    """That of a scale is a product, and made of that of an offset.

    SGD multiplies it by the learning rate. TensorFlow then multiplies in another order where
    the gradient of the offset is used in another way.
    """
    x = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")

    def fitted(cls):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        outputs = keras.layers.Dense(5, "relu")(inputs)
        outputs = keras.layers.Dropout(0.25)(keras.layers.BatchNormalization()(outputs))
        model = cls(inputs, keras.layers.Dense(1)(outputs))
        model.compile(ALL[name](), "mse", jit_compile=False)
        model.fit(x, x[:, :1], epochs=4, batch_size=16, verbose=0)
        return model.get_weights()

    assert_equal_bitwise(fitted(TapeModel), fitted(keras.Model))
    assert bool(joints) == (name == "Adam")


@pytest.mark.parametrize(("name", "waits"), [("Adam", False), ("SGD clipped", True)])
def test_an_update_waits_for_other_gradients_only_where_it_would_round_differently(name, waits):
    make = {
        "Adam": keras.optimizers.Adam,
        "SGD clipped": lambda: keras.optimizers.SGD(clipnorm=1.0),
    }
    optimizer, variables = make[name](), make_variables()
    optimizers.build(optimizer, variables)

    @tf.function(autograph=False)
    def step(gradients):
        with fast_trace.traced_once([optimizer]):
            optimizer.apply(gradients, variables)

    graph = step.get_concrete_function([tf.TensorSpec(shape) for shape in SHAPES]).graph
    read = {t.op.type for op in graph.get_operations() for t in op.inputs if "update" in op.name}
    assert ("IdentityN" in read) == waits
