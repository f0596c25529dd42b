"""Train a small CNN on scikit-learn's digits, with all convolutions by gpuconv, on NumPy or CuPy.

    python bench/train_digits.py [--epochs 30] [--plot digits.png]

The arrays are made by ``gpuconv.array_module()``, so the same script runs on a GPU or on the backend that
GPUCONV_BACKEND names. It prints the accuracy on held-out images; its exit status is 1 if this is below 97 %.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import gpuconv

PASS = 0.97
BATCH = 64
RATE, MOMENTUM = 0.05, 0.9


class Network:
    """Three 3x3 convolutions, two of them with stride 2, and one over the remaining extent, for the ten scores."""

    settings = (
        {"padding": 1, "activation": "relu"},
        {"padding": 1, "stride": 2, "activation": "relu"},
        {"padding": 1, "stride": 2, "activation": "relu"},
        {},
    )
    shapes = ((32, 1, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (10, 64, 2, 2))

    def __init__(self, xp, rng):
        self.xp = xp
        self.weights = [
            xp.asarray(rng.normal(0, np.sqrt(2 / np.prod(s[1:])), s).astype(np.float32)) for s in self.shapes
        ]
        self.biases = [xp.zeros(s[0], np.float32) for s in self.shapes]
        self.velocities = [xp.zeros_like(p) for p in self.parameters]

    @property
    def parameters(self):
        return [*self.weights, *self.biases]

    def forward(self, images):
        """Return the images and the results of all layers; the last one is the scores."""
        results = [images]
        for w, b, settings in zip(self.weights, self.biases, self.settings, strict=True):
            results.append(gpuconv.conv(results[-1], w, b, **settings))
        return results

    def step(self, images, labels, rate):
        """Take one step of gradient descent with momentum and return the mean loss before it."""
        xp = self.xp
        results = self.forward(images)
        scores = results[-1].reshape(len(labels), -1)
        probabilities = xp.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        rows = xp.arange(len(labels))
        loss = -xp.log(probabilities[rows, labels]).mean()
        probabilities[rows, labels] -= 1
        gradient = (probabilities / len(labels)).reshape(results[-1].shape)

        gradients = []
        for layer in reversed(range(len(self.weights))):
            needs = ("dx", "dw", "db") if layer else ("dw", "db")  # the gradient of the images is not needed
            settings = self.settings[layer]
            y = results[layer + 1] if "activation" in settings else None
            gradient, dw, db = gpuconv.conv_backward(
                gradient, results[layer], self.weights[layer], y=y, needs=needs, **settings
            )
            gradients.append((dw, db))
        dws, dbs = zip(*reversed(gradients), strict=True)
        for parameter, velocity, slope in zip(self.parameters, self.velocities, [*dws, *dbs], strict=True):
            velocity *= MOMENTUM
            velocity -= rate * slope
            parameter += velocity
        return float(loss)

    def predict(self, images):
        return self.forward(images)[-1].reshape(len(images), -1).argmax(axis=1)


def load(xp, rng):
    """Return training images and labels, then held-out ones; images are (N, 1, 8, 8), from 0 to 1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = rng.permutation(len(digits.target))
    images = (digits.images[order, None] / 16).astype(np.float32)
    labels = digits.target[order]
    return tuple(xp.asarray(part) for part in (images[:1400], labels[:1400], images[1400:], labels[1400:]))


def shifted(xp, images, rng):
    """Return the images shifted at random by up to one pixel vertically and horizontally, as data augmentation."""
    room = xp.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    down, right = (int(step) for step in rng.integers(0, 3, 2))
    return room[:, :, down : down + 8, right : right + 8]


def train(network, images, labels, epochs, rng):
    """Train a network and return the mean loss of every epoch."""
    from rich.progress import track

    losses = []
    for epoch in track(range(epochs), description="training", transient=True):
        rate = RATE * (1 - epoch / epochs)
        order = network.xp.asarray(rng.permutation(len(labels)))
        batches = [order[start : start + BATCH] for start in range(0, len(labels), BATCH)]
        losses.append(
            float(
                np.mean(
                    [network.step(shifted(network.xp, images[batch], rng), labels[batch], rate) for batch in batches]
                )
            )
        )
    return losses


def plot(path, losses, images, labels, predicted, accuracy):
    """Save a figure of the loss and of up to 16 misclassified held-out digits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    axes = left.subplots()
    axes.semilogy(range(1, len(losses) + 1), losses, marker=".")
    axes.set(xlabel="epoch", ylabel="mean cross-entropy", title="Training loss")
    axes.grid(alpha=0.3)
    wrong = np.flatnonzero(labels != predicted)
    right.suptitle(f"{len(wrong)} of {len(labels)} held-out digits misclassified ({accuracy:.1%} right)")
    for place, axis in enumerate(right.subplots(4, 4).flat):
        axis.axis("off")
        if place < len(wrong):
            axis.imshow(images[wrong[place], 0], cmap="gray_r")
            axis.set_title(f"{labels[wrong[place]]} taken for {predicted[wrong[place]]}", fontsize=7)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--plot", type=Path, default=Path("digits.png"), metavar="FILE")
    options = parser.parse_args()
    if not options.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {options.plot.parent}")

    xp = gpuconv.array_module()
    rng = np.random.default_rng(7)
    images, labels, held_out, held_out_labels = load(xp, rng)
    network = Network(xp, rng)
    start = time.perf_counter()
    losses = train(network, images, labels, options.epochs, rng)
    predicted = network.predict(held_out)
    accuracy = float((predicted == held_out_labels).mean())
    seconds = time.perf_counter() - start
    print(f"{accuracy:.1%} of {len(held_out_labels)} held-out digits right after {options.epochs} epochs")
    print(f"{seconds:.1f} s on {xp.__name__}")
    held_out, held_out_labels, predicted = (
        a.get() if hasattr(a, "get") else a for a in (held_out, held_out_labels, predicted)
    )
    plot(options.plot, losses, held_out, held_out_labels, predicted, accuracy)
    print(f"wrote {options.plot}")
    return 0 if accuracy >= PASS else 1


if __name__ == "__main__":
    sys.exit(main())
