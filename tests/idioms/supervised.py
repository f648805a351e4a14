"""Programs that leave the step to `fit`: masks, several heads, layers with losses, adapters."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from .support import Program, numbers, tokens


def siamese_add_loss(Model: Any) -> Program:
    """The loss comes from a layer; `compile` gets none."""

    class Contrast(layers.Layer):
        def call(self, inputs):
            first, second = inputs
            self.add_loss(ops.mean(ops.square(first - second)))
            return ops.concatenate(inputs, axis=-1)

    shared = layers.Dense(3, activation="tanh")
    inputs = [keras.Input((4,)), keras.Input((4,))]
    model = Model(inputs, Contrast()([shared(x) for x in inputs]))
    return Program(model, ([numbers(12, 4), numbers(12, 4, seed=1)],), {"optimizer": "adam"})


def masked_language_model(Model: Any) -> Program:
    """Loss of masked places only, by sample weights, in a step in the guide's words."""

    class MLM(Model):
        def train_step(self, inputs):
            features, labels, weight = inputs
            with tf.GradientTape() as tape:
                predictions = self(features, training=True)
                loss = self.loss_fn(labels, predictions, sample_weight=weight)
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            self.tracker.update_state(loss)
            return {"loss": self.tracker.result()}

        @property
        def metrics(self):
            return [self.tracker]

    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(9, 4)(inputs)
    hidden = hidden + layers.MultiHeadAttention(2, 2)(hidden, hidden)
    hidden = layers.LayerNormalization()(hidden)
    model = MLM(inputs, layers.Dense(9, activation="softmax")(hidden))
    model.loss_fn = keras.losses.SparseCategoricalCrossentropy()
    model.tracker = keras.metrics.Mean(name="loss")
    weight = (tokens(12, 5, high=2, seed=2)).astype("float32")
    data = (tokens(12, 5), tokens(12, 5, seed=1), weight)
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(4)
    return Program(model, (dataset,), {"optimizer": "adam"})


def graph_network(Model: Any) -> Program:
    """Nodes, edges and a pooling matrix as a dictionary; messages by segment sums."""

    class Messages(layers.Layer):
        def build(self, shapes):
            self.kernel = self.add_weight(shape=(3, 3), name="kernel")
            self.built = True

        def call(self, inputs):
            nodes, adjacency = inputs
            return ops.relu(ops.matmul(adjacency, ops.matmul(nodes, self.kernel))) + nodes

    class GNN(Model):
        def __init__(self):
            super().__init__()
            self.steps = [Messages(), Messages()]
            self.readout = layers.Dense(1)

        def call(self, inputs):
            nodes = inputs["nodes"]
            for step in self.steps:
                nodes = step([nodes, inputs["adjacency"]])
            return self.readout(ops.sum(nodes, axis=1))

    adjacency = (tokens(12, 4, 4, high=2)).astype("float32")
    return Program(
        GNN(), ({"nodes": numbers(12, 4, 3), "adjacency": adjacency}, numbers(12, 1, seed=1))
    )


def seq2seq(Model: Any) -> Program:
    """An encoder whose states begin the decoder, padded with zeros on both sides."""
    source, target = keras.Input((4,), dtype="int32"), keras.Input((3,), dtype="int32")
    encoded = layers.Embedding(9, 4, mask_zero=True)(source)
    _, *states = layers.LSTM(3, return_state=True)(encoded)
    decoded = layers.Embedding(9, 4, mask_zero=True)(target)
    decoded = layers.LSTM(3, return_sequences=True)(decoded, initial_state=states)
    model = Model([source, target], layers.Dense(9, activation="softmax")(decoded))
    y = tokens(12, 3, seed=2)
    return Program(
        model,
        ([tokens(12, 4), tokens(12, 3, seed=1)], y),
        {
            "optimizer": "rmsprop",
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
        },
    )


def text_classification(Model: Any) -> Program:
    """Tokens and positions, a transformer block with dropout, padding masked."""

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_masking = True
            self.attention = layers.MultiHeadAttention(2, 2, dropout=0.1)
            self.norm = layers.LayerNormalization()
            self.dropout = layers.Dropout(0.2)

        def build(self, shape):
            self.attention.build(shape, shape)
            self.norm.build(shape)
            self.built = True

        def call(self, x, training=None):
            attended = self.dropout(self.attention(x, x, training=training), training=training)
            return self.norm(x + attended)

    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(9, 4, mask_zero=True)(inputs)
    hidden = layers.GlobalAveragePooling1D()(Block()(hidden))
    model = Model(inputs, layers.Dense(2, activation="softmax")(hidden))
    return Program(
        model,
        (tokens(12, 6), tokens(12, high=2)),
        {
            "optimizer": "adam",
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
        },
    )


def multi_task_ranking(Model: Any) -> Program:
    """Users and items, a rating and a retrieval loss, weights, `compute_loss` of its own."""

    class Ranking(Model):
        def __init__(self):
            super().__init__()
            self.users, self.items = layers.Embedding(9, 3), layers.Embedding(9, 3)
            self.rating = keras.Sequential([layers.Dense(4, "relu"), layers.Dense(1)])
            self.rate_loss = keras.losses.MeanSquaredError()
            self.retrieve_loss = keras.losses.CategoricalCrossentropy(from_logits=True)

        def call(self, inputs):
            user, item = self.users(inputs["user"]), self.items(inputs["item"])
            return {
                "user": user,
                "item": item,
                "rating": self.rating(ops.concatenate([user, item], -1)),
            }

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            scores = ops.matmul(y_pred["user"], ops.transpose(y_pred["item"]))
            labels = ops.eye(ops.shape(scores)[0])
            return 0.5 * self.rate_loss(y, y_pred["rating"]) + self.retrieve_loss(labels, scores)

    data = {"user": tokens(12), "item": tokens(12, seed=1)}
    return Program(
        Ranking(),
        (data, numbers(12, 1)),
        {"optimizer": keras.optimizers.Adagrad(0.1), "jit_compile": False},
    )


def lora(Model: Any) -> Program:
    """`enable_lora` on a frozen backbone, and an adapter layer written by hand."""

    class LoRA(layers.Layer):
        def __init__(self, inner, rank=2):
            super().__init__()
            self.inner = inner
            self.inner.trainable = False
            self.down = layers.Dense(rank, use_bias=False)
            self.up = layers.Dense(inner.units, use_bias=False, kernel_initializer="zeros")

        def call(self, x):
            return self.inner(x) + 2.0 * self.up(self.down(x))

    inputs = keras.Input((5,))
    backbone = layers.Dense(4, activation="relu", name="backbone")
    hidden = LoRA(layers.Dense(4))(backbone(inputs))
    model = Model(inputs, layers.Dense(1)(hidden))
    backbone.enable_lora(2)
    return Program(model, (numbers(12, 5), numbers(12, 1, seed=1)))


def mixture_of_experts(Model: Any) -> Program:
    """A router with noise and a loss that balances the experts."""

    class Switch(layers.Layer):
        def __init__(self):
            super().__init__()
            self.experts = [layers.Dense(3) for _ in range(3)]
            self.route = layers.Dense(3)
            self.noise = layers.GaussianNoise(0.1, seed=4)

        def call(self, x, training=None):
            gates = ops.softmax(self.route(self.noise(x, training=training)))
            self.add_loss(0.01 * ops.sum(ops.square(ops.mean(gates, axis=0))))
            outputs = ops.stack([expert(x) for expert in self.experts], axis=1)
            return ops.sum(outputs * ops.expand_dims(gates, -1), axis=1)

    class MoE(Model):
        def __init__(self):
            super().__init__()
            self.switch, self.head = Switch(), layers.Dense(1, kernel_regularizer="l2")

        def call(self, x, training=None):
            return self.head(self.switch(x, training=training))

    return Program(MoE(), (numbers(12, 4), numbers(12, 1, seed=1)))


def pinn(Model: Any) -> Program:
    """The residual of u'' = -u, by two tapes in `compute_loss`."""

    class PINN(Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = layers.Dense(6, "tanh"), layers.Dense(1)

        def call(self, t):
            return self.last(self.hidden(t))

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            x = tf.convert_to_tensor(x)
            with tf.GradientTape() as second:
                second.watch(x)
                with tf.GradientTape() as first:
                    first.watch(x)
                    u = self(x, training=training)
                du = first.gradient(u, x)
            residual = second.gradient(du, x) + u
            start = self(tf.zeros((1, 1))) - 1.0
            return tf.reduce_mean(tf.square(residual)) + tf.reduce_mean(tf.square(start))

    x = np.linspace(0, 3, 12, dtype="float32")[:, None]
    return Program(PINN(), (x, np.cos(x)), {"optimizer": keras.optimizers.Adam(0.01)})


def hypernetwork(Model: Any) -> Program:
    """A network whose outputs are another's weights, which are set to them."""

    class Hyper(Model):
        def __init__(self):
            super().__init__()
            self.made = layers.Dense(6)
            self.main = layers.Dense(2, trainable=False)

        def build(self, shape):
            self.made.build(shape)
            self.main.build((None, 3))
            self.built = True

        def call(self, x):
            kernel = ops.reshape(ops.mean(self.made(x), axis=0), (3, 2))
            return ops.matmul(x[:, :3], kernel)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(grads, self.trainable_variables)
            self.main.kernel.assign(ops.reshape(ops.mean(self.made(x), axis=0), (3, 2)))
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    return Program(
        Hyper(),
        (numbers(12, 4), numbers(12, 2, seed=1)),
        {"optimizer": "sgd", "loss": "mse", "metrics": ["mae"]},
    )


def quantization_aware(Model: Any) -> Program:
    """Weights rounded forward, straight through backward; ranges are running averages."""

    @tf.custom_gradient
    def rounded(x):
        return tf.round(x * 8.0) / 8.0, lambda upstream: upstream

    class Quantized(layers.Dense):
        def build(self, shape):
            super().build(shape)
            self.range = self.add_weight(
                shape=(), initializer="ones", trainable=False, name="range"
            )

        def call(self, x, training=None):
            if training:
                self.range.assign(0.9 * self.range + 0.1 * ops.max(ops.abs(x)))
            return ops.matmul(rounded(x / self.range), rounded(self.kernel)) + self.bias

    inputs = keras.Input((5,))
    model = Model(inputs, Quantized(1)(Quantized(4)(inputs)))
    return Program(model, (numbers(12, 5), numbers(12, 1, seed=1)))


def mixed_precision(Model: Any) -> Program:
    """Half precision with a dynamic loss scale; the backbone frozen."""
    policy = keras.DTypePolicy("mixed_float16")
    inputs = keras.Input((5,))
    frozen = layers.Dense(6, activation="relu", dtype=policy, trainable=False)(inputs)
    hidden = layers.BatchNormalization(dtype=policy)(frozen)
    outputs = layers.Dense(1, dtype="float32")(layers.Dense(4, dtype=policy)(hidden))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    return Program(
        Model(inputs, outputs),
        (numbers(12, 5), numbers(12, 1, seed=1)),
        {"optimizer": optimizer, "loss": "mse"},
    )
