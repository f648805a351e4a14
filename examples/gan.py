"""Train a generator against a critic on small images of digits (WGAN-GP).

One model, two networks, two optimizers. The custom `train_step` computes each loss under
`model.gradient_tape()` and passes it to `tape.minimize`, with its variables and its
optimizer. The targets of the hooks select one network or the other, and the gradient
penalty is a gradient of a gradient: an ordinary tape inside the model's tape.
Half of the training is saved, loaded into a new model and continued there.

    python examples/gan.py --output-dir .
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument("--epochs", type=int, default=200, help="epochs in both halves together")
PARSER.add_argument(
    "--output-dir",
    type=Path,
    help="where the picture and the model are kept; None: a temporary folder",
)

if __name__ == "__main__":
    # Before the imports, which take seconds.
    PARSER.parse_args()
    print("Trains a generator of digits; ten lines will show how it goes.", flush=True)

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from keras_tapefit import TapeModel, hooks

NOISE_SIZE = 16
BATCH_SIZE = 64


@keras.saving.register_keras_serializable("examples")
class WGAN(TapeModel):
    """A Wasserstein GAN with gradient penalty.

    Args:
        penalty: the weight of the gradient penalty.
        critic_steps: updates of the critic for each one of the generator.
    """

    def __init__(self, penalty: float = 10.0, critic_steps: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.penalty = penalty
        self.critic_steps = critic_steps
        self.generator = keras.Sequential(
            [
                keras.Input((NOISE_SIZE,)),
                layers.Dense(128, activation="relu"),
                layers.Dense(128, activation="relu"),
                layers.Dense(64, activation="sigmoid"),
            ],
            name="generator",
        )
        self.critic = keras.Sequential(
            [
                keras.Input((64,)),
                layers.Dense(128, activation="leaky_relu"),
                layers.Dense(128, activation="leaky_relu"),
                layers.Dense(1),
            ],
            name="critic",
        )
        self.seeds = keras.random.SeedGenerator(0)
        self.critic_loss = keras.metrics.Mean(name="critic_loss")
        self.generator_loss = keras.metrics.Mean(name="generator_loss")

    def get_config(self):
        return {"penalty": self.penalty, "critic_steps": self.critic_steps}

    def compile(self, critic_optimizer, generator_optimizer, **kwargs):
        super().compile(**kwargs)
        self.critic_optimizer = critic_optimizer
        self.generator_optimizer = generator_optimizer

    def get_compile_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_compile_config(),
            "critic_optimizer": serialize(self.critic_optimizer),
            "generator_optimizer": serialize(self.generator_optimizer),
        }

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    @property
    def metrics(self):
        return [self.critic_loss, self.generator_loss]

    def generate(self, count):
        return self.generator(keras.random.normal((count, NOISE_SIZE), seed=self.seeds))

    def critic_objective(self, real):
        count = tf.shape(real)[0]
        fake = self.generate(count)
        mix = keras.random.uniform((count, 1), seed=self.seeds)
        between = mix * real + (1.0 - mix) * fake
        with tf.GradientTape() as tape:
            tape.watch(between)
            scores = self.critic(between)
        slopes = tf.norm(tape.gradient(scores, between) + 1e-12, axis=1)
        distance = tf.reduce_mean(self.critic(fake)) - tf.reduce_mean(self.critic(real))
        return distance + self.penalty * tf.reduce_mean(tf.square(slopes - 1.0))

    def train_step(self, real):
        for _ in range(self.critic_steps):
            with self.gradient_tape() as tape:
                loss = self.critic_objective(real)
            tape.minimize(loss, self.critic.trainable_variables, self.critic_optimizer)
            self.critic_loss.update_state(loss)
        with self.gradient_tape() as tape:
            loss = -tf.reduce_mean(self.critic(self.generate(tf.shape(real)[0])))
        tape.minimize(loss, self.generator.trainable_variables, self.generator_optimizer)
        self.generator_loss.update_state(loss)
        return {metric.name: metric.result() for metric in self.metrics}


def build_model() -> WGAN:
    model = WGAN()
    model.compile(
        critic_optimizer=keras.optimizers.Adam(5e-4, beta_1=0.5, beta_2=0.9),
        generator_optimizer=keras.optimizers.Adam(5e-4, beta_1=0.5, beta_2=0.9),
        gradient_hooks=[
            hooks.GradientMonitor(targets="critic/*", name="critic"),
            hooks.GlobalNormClipping(10.0, targets="critic/*"),
            hooks.GradientMonitor(targets="generator/*", name="generator"),
        ],
    )
    return model


def load_images() -> np.ndarray:
    """Returns 1797 images of 8 x 8 pixels, one a row, from 0 to 1."""
    return load_digits().data.astype("float32") / 16.0


def train(model: WGAN, images: np.ndarray, first_epoch: int, last_epoch: int, every: int) -> None:
    def show(epoch, logs):
        if (epoch + 1) % every == 0 or epoch + 1 == last_epoch:
            numbers = "  ".join(f"{name} {logs[name]:8.4f}" for name in sorted(logs))
            print(f"epoch {epoch + 1:3d}  {numbers}", flush=True)

    model.fit(
        images,
        batch_size=BATCH_SIZE,
        initial_epoch=first_epoch,
        epochs=last_epoch,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=show)],
        verbose=0,
    )


def draw(images: np.ndarray, generated: np.ndarray) -> Figure:
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    for half, rows, title in zip(
        figure.subfigures(1, 2), (images, generated), ("digits", "generated"), strict=True
    ):
        half.suptitle(title)
        for axes, row in zip(half.subplots(8, 8).flat, rows, strict=True):
            axes.imshow(row.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axes.axis("off")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    args = PARSER.parse_args(argv)
    output_dir = args.output_dir or Path(tempfile.mkdtemp(prefix="gan_"))
    output_dir.mkdir(parents=True, exist_ok=True)

    keras.utils.set_random_seed(0)
    images = load_images()
    model = build_model()
    half, every = args.epochs // 2, max(1, args.epochs // 10)
    train(model, images, 0, half, every)
    path = output_dir / "gan.keras"
    model.save(path)
    model = keras.models.load_model(path)
    print(f"saved and loaded: {path.name}")
    train(model, images, half, args.epochs, every)

    generated = np.asarray(model.generate(64))
    figure_path = output_dir / "gan.png"
    draw(images[:64], generated).savefig(figure_path)
    print(f"picture: {figure_path}")
    # Like the digits, and unlike noise: dark strokes in the middle, light at the sides.
    for name, rows in (("digits", images), ("generated", generated)):
        columns = rows.reshape(-1, 8, 8).mean((0, 1))
        print(f"{name:9s} mean ink of the 8 columns: {' '.join(f'{c:.2f}' for c in columns)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
