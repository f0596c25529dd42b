"""Deblur a photograph by lsqr on gpuconv.linear_operator.

    python bench/deblur.py [--plot FILE] [--borders MODE]

The photograph is blurred by a diagonal motion of 15 pixels, and noise of 1 % is added. It is restored by minimising

    min |blur x - y|^2 + smooth^2 |differences x|^2

where blur and differences are convolutions. Beyond its borders the photograph is zero or, with --borders, continued by
another padding mode of gpuconv.conv: periodically with "circular". The differences are those of its own pixels. SciPy's
solver uses only their products and adjoint products. With GPUCONV_BACKEND=cupy these are computed on a GPU. The script
prints the peak signal-to-noise ratios; its exit status is 1 if the gain is less than 3 dB.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress
from scipy.sparse.linalg import LinearOperator, lsqr
from sklearn.datasets import load_sample_image

import gpuconv
from gpuconv.arguments import PADDING_MODES

MOTION = np.eye(15) / 15
DIFFERENCES = np.array([[[[-1.0, 1.0], [0.0, 0.0]]], [[[-1.0, 0.0], [1.0, 0.0]]]])  # along rows and columns
NOISE = 0.01  # standard deviation, relative to the range from black to white
PASS = 3  # required gain in decibels


def psnr(image, truth):
    """Return the peak signal-to-noise ratio in decibels, for a range from 0 to 1."""
    return -10 * np.log10(np.mean((np.clip(image, 0, 1) - truth) ** 2))


def restored(blurred, blur, differences, smooth, steps):
    """Return the least-squares solution, an image as a vector."""
    pixels, others = blur.shape[0], differences.shape[0]
    with Progress(transient=True) as progress:
        task = progress.add_task("lsqr", total=steps)

        def forward(x):
            return np.concatenate([blur @ x, smooth * (differences @ x)])

        def adjoint(y):
            progress.advance(task)  # once in each step
            return blur.H @ y[:pixels] + smooth * (differences.H @ y[pixels:])

        both = LinearOperator((pixels + others, blur.shape[1]), forward, adjoint, dtype=blurred.dtype)
        return lsqr(both, np.concatenate([blurred, np.zeros(others)]), iter_lim=steps)[0]


def pictures(path, images):
    """Save a figure of images (3, H, W) side by side, with their titles."""
    figure = Figure(figsize=(5 * len(images), 3.7), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        axes.imshow(np.clip(np.moveaxis(image, 0, -1), 0, 1))
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=70)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="writes the three pictures")
    parser.add_argument("--borders", choices=PADDING_MODES, default="zeros", help="padding mode (default zeros)")
    parser.add_argument("--smooth", type=float, default=0.06, metavar="S", help="weight of differences (default 0.06)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="at the most (default 30)")
    options = parser.parse_args()
    if options.plot and not options.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {options.plot.parent}")

    truth = np.moveaxis(load_sample_image("china.jpg") / 255.0, -1, 0)[:, None]  # three images of one channel
    shape, truth = truth.shape, truth.ravel()
    blur = gpuconv.linear_operator(MOTION[None, None], shape, padding="same", padding_mode=options.borders)
    blurred = blur @ truth + NOISE * np.random.default_rng(0).standard_normal(truth.size)
    found = restored(blurred, blur, gpuconv.linear_operator(DIFFERENCES, shape), options.smooth, options.steps)

    before, after = psnr(blurred, truth), psnr(found, truth)
    print(f"blurred {before:.2f} dB, restored {after:.2f} dB: {after - before:.2f} dB gained")
    if options.plot:
        images = {"photograph": truth, f"blurred: {before:.1f} dB": blurred, f"restored: {after:.1f} dB": found}
        pictures(options.plot, {name: image.reshape(3, *shape[2:]) for name, image in images.items()})
    return 0 if after - before >= PASS else 1


if __name__ == "__main__":
    sys.exit(main())
