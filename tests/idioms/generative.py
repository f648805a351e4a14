"""Programs with steps of their own: generative models, contrastive learning, teachers."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

from .support import Program, numbers, tokens


def vae(Model: Any) -> Program:
    """The reparametrised sample, two terms of loss, trackers; parts called, never the model."""

    class Sampling(layers.Layer):
        def __init__(self):
            super().__init__()
            self.seed_generator = keras.random.SeedGenerator(7)

        def call(self, inputs):
            mean, log_var = inputs
            noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
            return mean + ops.exp(0.5 * log_var) * noise

    class VAE(Model):
        def __init__(self, encoder, decoder):
            super().__init__()
            self.encoder, self.decoder = encoder, decoder
            self.total = keras.metrics.Mean(name="total")
            self.kl = keras.metrics.Mean(name="kl")

        @property
        def metrics(self):
            return [self.total, self.kl]

        def train_step(self, data):
            with tf.GradientTape() as tape:
                mean, log_var, z = self.encoder(data)
                error = ops.mean(ops.sum(ops.square(data - self.decoder(z)), axis=-1))
                kl = -0.5 * (1 + log_var - ops.square(mean) - ops.exp(log_var))
                kl = ops.mean(ops.sum(kl, axis=1))
                total = error + kl
            grads = tape.gradient(total, self.trainable_weights)
            self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
            self.total.update_state(total)
            self.kl.update_state(kl)
            return {"loss": self.total.result(), "kl": self.kl.result()}

    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="relu")(inputs)
    mean, log_var = layers.Dense(2)(hidden), layers.Dense(2)(hidden)
    encoder = keras.Model(inputs, [mean, log_var, Sampling()([mean, log_var])])
    decoder = keras.Sequential([keras.Input((2,)), layers.Dense(6)])
    return Program(VAE(encoder, decoder), (numbers(12, 6),), {"optimizer": "adam"})


def wgan_gp(Model: Any) -> Program:
    """Two optimizers in a `compile` of its own, a gradient penalty, two critic updates."""

    class WGAN(Model):
        def __init__(self, critic, generator):
            super().__init__()
            self.critic, self.generator = critic, generator
            self.seed_generator = keras.random.SeedGenerator(1)

        def compile(self, critic_optimizer, generator_optimizer):
            super().compile()
            self.critic_optimizer = critic_optimizer
            self.generator_optimizer = generator_optimizer

        def penalty(self, real, fake):
            share = keras.random.uniform((ops.shape(real)[0], 1), seed=self.seed_generator)
            mixed = real + share * (fake - real)
            with tf.GradientTape() as tape:
                tape.watch(mixed)
                out = self.critic(mixed, training=True)
            grads = tape.gradient(out, mixed)
            norm = ops.sqrt(ops.sum(ops.square(grads), axis=1) + 1e-9)
            return ops.mean((norm - 1.0) ** 2)

        def train_step(self, real):
            size = ops.shape(real)[0]
            for _ in range(2):
                noise = keras.random.normal((size, 2), seed=self.seed_generator)
                with tf.GradientTape() as tape:
                    fake = self.generator(noise, training=True)
                    cost = ops.mean(self.critic(fake)) - ops.mean(self.critic(real))
                    c_loss = cost + 10.0 * self.penalty(real, fake)
                grads = tape.gradient(c_loss, self.critic.trainable_variables)
                self.critic_optimizer.apply_gradients(
                    zip(grads, self.critic.trainable_variables, strict=True)
                )
            noise = keras.random.normal((size, 2), seed=self.seed_generator)
            with tf.GradientTape() as tape:
                g_loss = -ops.mean(self.critic(self.generator(noise, training=True)))
            grads = tape.gradient(g_loss, self.generator.trainable_variables)
            self.generator_optimizer.apply_gradients(
                zip(grads, self.generator.trainable_variables, strict=True)
            )
            return {"c_loss": c_loss, "g_loss": g_loss}

    critic = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(1)])
    generator = keras.Sequential([keras.Input((2,)), layers.Dense(4)])
    optimizers = [keras.optimizers.Adam(0.01), keras.optimizers.RMSprop(0.01)]
    return Program(
        WGAN(critic, generator),
        (tf.data.Dataset.from_tensor_slices(numbers(12, 4)).batch(4),),
        {"critic_optimizer": optimizers[0], "generator_optimizer": optimizers[1]},
    )


def distillation(Model: Any) -> Program:
    """A frozen teacher; only `compute_loss` is its own."""

    class Distiller(Model):
        def __init__(self, student, teacher):
            super().__init__()
            self.student, self.teacher = student, teacher

        def compile(self, alpha=0.1, temperature=3.0, **kwargs):
            super().compile(**kwargs)
            self.alpha, self.temperature = alpha, temperature
            self.soft = keras.losses.KLDivergence()

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False):
            teacher = self.teacher(x, training=False)
            hard = self.compiled_hard(y, y_pred)
            soft = self.soft(
                ops.softmax(teacher / self.temperature), ops.softmax(y_pred / self.temperature)
            )
            return self.alpha * hard + (1 - self.alpha) * soft * self.temperature**2

        def compiled_hard(self, y, y_pred):
            losses = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
            return ops.mean(losses)

        def call(self, x):
            return self.student(x)

    teacher = keras.Sequential([keras.Input((5,)), layers.Dense(8, "relu"), layers.Dense(3)])
    teacher.trainable = False
    student = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    metrics = [keras.metrics.SparseCategoricalAccuracy()]
    return Program(
        Distiller(student, teacher),
        (numbers(12, 5), tokens(12, high=3)),
        {"optimizer": "adam", "metrics": metrics, "alpha": 0.3},
    )


def simclr_queue(Model: Any) -> Program:
    """Nearest neighbours of a queue of features, in a bare `tf.Variable`."""

    class NNCLR(Model):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder
            start = tf.math.l2_normalize(tf.constant(numbers(8, 3, seed=5)), axis=1)
            self.queue = tf.Variable(start, trainable=False)
            self.seen = tf.Variable(0, dtype=tf.int64)
            self.tracker = keras.metrics.Mean(name="c_loss")

        @property
        def metrics(self):
            return [self.tracker]

        def call(self, x):
            return tf.math.l2_normalize(self.encoder(x), axis=1)

        def train_step(self, data):
            noise = 0.1 * tf.random.stateless_normal(tf.shape(data), [1, 2])
            with tf.GradientTape() as tape:
                first, second = self(data, training=True), self(data + noise, training=True)
                nearest = tf.argmax(tf.matmul(first, self.queue, transpose_b=True), axis=1)
                neighbours = tf.gather(self.queue, nearest)
                logits = tf.matmul(neighbours, second, transpose_b=True) / 0.1
                labels = tf.range(tf.shape(data)[0])
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                )
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            self.queue.assign(tf.concat([first, self.queue[: -tf.shape(first)[0]]], axis=0))
            self.seen.assign_add(tf.shape(data, out_type=tf.int64)[0])
            self.tracker.update_state(loss)
            return {m.name: m.result() for m in self.metrics}

    encoder = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    return Program(NNCLR(encoder), (numbers(12, 5),), {"optimizer": "adam"})


def ddim_ema(Model: Any) -> Program:
    """A denoiser with a normalizer, a copy whose weights are running averages, a schedule."""

    class Diffusion(Model):
        def __init__(self):
            super().__init__()
            self.normalizer = layers.Normalization()
            self.network = keras.Sequential([keras.Input((5,)), layers.Dense(4)])
            self.averaged = keras.models.clone_model(self.network)
            self.seed_generator = keras.random.SeedGenerator(3)

        def compile(self, **kwargs):
            super().compile(**kwargs)
            self.noise_loss = keras.metrics.Mean(name="n_loss")

        @property
        def metrics(self):
            return [self.noise_loss]

        def call(self, x, training=False):
            return (self.network if training else self.averaged)(x)

        def train_step(self, data):
            data = self.normalizer(data, training=True)
            size = ops.shape(data)[0]
            noise = keras.random.normal((size, 4), seed=self.seed_generator)
            time = keras.random.uniform((size, 1), seed=self.seed_generator)
            noisy = ops.cos(time) * data + ops.sin(time) * noise
            with tf.GradientTape() as tape:
                guess = self.network(ops.concatenate([noisy, time], axis=1), training=True)
                loss = self.loss(noise, guess)
            grads = tape.gradient(loss, self.network.trainable_weights)
            self.optimizer.apply_gradients(zip(grads, self.network.trainable_weights, strict=True))
            self.noise_loss.update_state(loss)
            for weight, average in zip(self.network.weights, self.averaged.weights, strict=True):
                average.assign(0.9 * average + 0.1 * weight)
            return {m.name: m.result() for m in self.metrics}

    model = Diffusion()
    model.normalizer.adapt(numbers(12, 4))
    return Program(
        model,
        (numbers(12, 4),),
        {
            "optimizer": keras.optimizers.AdamW(0.01, weight_decay=1e-4),
            "loss": keras.losses.MeanAbsoluteError(),
        },
    )


def siamese_triplet(Model: Any) -> Program:
    """A triplet loss in a step of its own, around an inner network."""

    class Siamese(Model):
        def __init__(self, network, margin=0.5):
            super().__init__()
            self.network, self.margin = network, margin
            self.tracker = keras.metrics.Mean(name="t_loss")

        def call(self, inputs):
            return self.network(inputs)

        def distance(self, data):
            anchor, positive, negative = (self.network(x) for x in data)
            near = tf.reduce_sum(tf.square(anchor - positive), -1)
            far = tf.reduce_sum(tf.square(anchor - negative), -1)
            return tf.maximum(near - far + self.margin, 0.0)

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = self.distance(data)
            gradients = tape.gradient(loss, self.network.trainable_weights)
            self.optimizer.apply_gradients(
                zip(gradients, self.network.trainable_weights, strict=True)
            )
            self.tracker.update_state(loss)
            return {"t_loss": self.tracker.result()}

        @property
        def metrics(self):
            return [self.tracker]

    network = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.BatchNormalization()])
    triplets = tuple(numbers(12, 4, seed=i) for i in range(3))
    data = tf.data.Dataset.from_tensor_slices(triplets).batch(4)
    return Program(Siamese(network), (data,), {"optimizer": keras.optimizers.Adam(0.01)})


def maml(Model: Any) -> Program:
    """A step through a step: the inner loop's weights are tensors."""

    class MAML(Model):
        def __init__(self):
            super().__init__()
            self.w = self.add_weight(shape=(3, 1), initializer="glorot_uniform", name="w")
            self.b = self.add_weight(shape=(1,), initializer="zeros", name="b")

        def call(self, x):
            return ops.matmul(x, self.w) + self.b

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as outer:
                w, b = self.w.value, self.b.value
                for _ in range(2):
                    with tf.GradientTape() as inner:
                        inner.watch([w, b])
                        loss = tf.reduce_mean(tf.square(tf.matmul(x, w) + b - y))
                    dw, db = inner.gradient(loss, [w, b])
                    w, b = w - 0.1 * dw, b - 0.1 * db
                meta = tf.reduce_mean(tf.square(tf.matmul(x[::-1], w) + b - y[::-1]))
            grads = outer.gradient(meta, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            return {"meta": meta}

    return Program(MAML(), (numbers(12, 3), numbers(12, 1, seed=1)), {"optimizer": "adam"})


def dqn(Model: Any) -> Program:
    """Two copies of a network, one trained by `train_on_batch` on what the other says."""

    def build():
        inputs = keras.Input((4,))
        return Model(inputs, layers.Dense(2)(layers.Dense(5, activation="relu")(inputs)))

    online, target = build(), build()
    target.set_weights(online.get_weights())

    def train(model):
        losses = []
        for step in range(6):
            states, following = numbers(4, 4, seed=step), numbers(4, 4, seed=step + 50)
            values = ops.convert_to_numpy(target(following))
            wanted = ops.convert_to_numpy(model(states)).copy()
            wanted[:, step % 2] = 1.0 + 0.9 * values.max(axis=1)
            logs = model.train_on_batch(states, wanted, return_dict=True)
            losses.append(logs)
            if step % 3 == 2:
                target.set_weights(model.get_weights())
        return {name: [logs[name] for logs in losses] for name in losses[0]}

    return Program(
        online, (), {"optimizer": "adam", "loss": keras.losses.Huber()}, train, holds=(target,)
    )
