"""Fine-tune ResNet50 on five images: a frozen base first, then the whole network.

One `fit` does both. A callback unfreezes the base and lowers the learning rate at the
start of an epoch; nothing is compiled again, and the optimizer keeps its state for the
head. Each step sees one example. Afterwards the network predicts the five images, and
five others that it has not seen.

The weights of ResNet50 are RANDOM unless you pass `--weights imagenet`: without a
download, the program shows how to fine-tune, not what a pretrained network can do.

    python examples/fine_tune_resnet50.py
    python examples/fine_tune_resnet50.py --weights imagenet    # downloads the weights
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PARSER = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
PARSER.add_argument(
    "--weights",
    choices=["random", "imagenet"],
    default="random",
    help="where ResNet50 starts from; imagenet is downloaded",
)
PARSER.add_argument("--image-size", type=int, default=64, help="height and width in pixels")
PARSER.add_argument("--frozen-epochs", type=int, default=40, help="epochs with a frozen base")
PARSER.add_argument("--unfrozen-epochs", type=int, default=5, help="epochs of all of it")

if __name__ == "__main__":
    # Before the imports, which take seconds.
    weights = PARSER.parse_args().weights
    print(f"Fine-tunes ResNet50, from {weights} weights, on five images.", flush=True)

import keras
import numpy as np
from sklearn.datasets import load_sample_images

from keras_tapefit import TapeModel

# Five views of the two photographs that come with scikit-learn (427 by 640 pixels):
# name, photograph, top, left, height, width.
VIEWS = [
    ("temple", 0, 20, 40, 350, 350),
    ("lake", 0, 190, 370, 110, 110),
    ("trees", 0, 280, 370, 140, 140),
    ("flower", 1, 80, 175, 280, 280),
    ("leaves", 1, 90, 0, 150, 150),
]
# Other views of the same five things, to predict only.
HELD_OUT = [
    ("temple", 0, 40, 80, 300, 300),
    ("lake", 0, 205, 440, 110, 110),
    ("trees", 0, 270, 450, 140, 140),
    ("flower", 1, 60, 150, 300, 300),
    ("leaves", 1, 150, 20, 150, 150),
]


def load_images(views: list[tuple], image_size: int) -> np.ndarray:
    photographs = load_sample_images().images
    images = []
    for _, photograph, top, left, height, width in views:
        view = photographs[photograph][top : top + height, left : left + width]
        images.append(keras.ops.image.resize(view, (image_size, image_size)))
    images = np.stack([np.asarray(image, dtype="float32") for image in images])
    return keras.applications.resnet50.preprocess_input(images)


def make_model(weights: str | None, image_size: int) -> tuple[TapeModel, keras.Model]:
    base = keras.applications.ResNet50(
        include_top=False, weights=weights, input_shape=(image_size, image_size, 3)
    )
    inputs = keras.Input((image_size, image_size, 3))
    x = base(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(256, activation="relu")(x)
    x = keras.layers.Dropout(0.5)(x)
    outputs = keras.layers.Dense(10, activation="softmax")(x)
    return TapeModel(inputs, outputs), base


class UnfreezeBase(keras.callbacks.Callback):
    """Unfreezes `base` at the start of `epoch`, and sets the learning rate."""

    def __init__(self, base: keras.Model, epoch: int, learning_rate: float):
        super().__init__()
        # BatchNormalization stays frozen, and so in inference mode: a batch of one
        # example has no useful statistics.
        self.layers = [
            layer
            for layer in base.layers
            if layer.weights and not isinstance(layer, keras.layers.BatchNormalization)
        ]
        self.epoch = epoch
        self.learning_rate = learning_rate

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.unfreeze(self.layers)
            self.model.optimizer.learning_rate = self.learning_rate

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % 5:
            return
        print(
            f"epoch {epoch + 1:2d}  loss {logs['loss']:.4f}"
            f"  learning rate {float(self.model.optimizer.learning_rate):.0e}"
            f"  variables in training {len(self.model.trainable_variables)}",
            flush=True,
        )


def predict(model: TapeModel, kind: str, images: np.ndarray) -> None:
    names = [name for name, *_ in VIEWS]
    for truth, score in zip(names, model.predict(images, batch_size=1, verbose=0), strict=True):
        guess = int(np.argmax(score))
        # The head has ten outputs, and five of them have no image.
        name = names[guess] if guess < len(names) else f"class {guess}"
        print(f"{kind}: predicted {name} ({score[guess]:.2f}), truth {truth}")


def main(argv: Sequence[str] | None = None) -> None:
    args = PARSER.parse_args(argv)

    keras.utils.set_random_seed(0)
    x, y = load_images(VIEWS, args.image_size), np.arange(len(VIEWS))
    weights = None if args.weights == "random" else args.weights
    model, base = make_model(weights, args.image_size)
    model.freeze(base)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss="sparse_categorical_crossentropy",
    )
    model.fit(
        x,
        y,
        batch_size=1,
        epochs=args.frozen_epochs + args.unfrozen_epochs,
        callbacks=[UnfreezeBase(base, args.frozen_epochs, learning_rate=1e-5)],
        verbose=0,
    )

    predict(model, "trained on", x)
    predict(model, "not seen  ", load_images(HELD_OUT, args.image_size))
    if weights is None:
        print("The base had random weights. Pass --weights imagenet for pretrained ones.")


if __name__ == "__main__":
    main()
