"""An independent convolution in float64: a padded x, one strided view per tap, one einsum per tap.

Nothing is imported from gpuconv. Arrays are channels_first, (N, C, *spatial) and (F, C/G, *kernel), and results have
the dtype of the arguments; the tests pass float64 or complex128.
"""

import itertools

import numpy as np

MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}  # their names in NumPy


def padded(x, padding, mode="zeros"):
    """Return x with its spatial axes padded; negative padding crops."""
    pads = [(0, 0), (0, 0), *((max(low, 0), max(high, 0)) for low, high in padding)]
    x = np.pad(x, pads, MODES[mode])
    crops = []
    for n, (low, high) in zip(x.shape[2:], padding, strict=True):
        crops.append(slice(max(-low, 0), n - max(-high, 0)))
    return x[(slice(None), slice(None), *crops)]


def taps(kernel, stride, dilation, outputs):
    """Yield every tap with the slices of padded x that it reads."""
    for tap in itertools.product(*(range(k) for k in kernel)):
        yield (
            tap,
            tuple(
                slice(t * d, t * d + (m - 1) * s + 1, s)
                for t, d, s, m in zip(tap, dilation, stride, outputs, strict=True)
            ),
        )


def output_extent(n, k, s, d, low, high):
    return (n + low + high - d * (k - 1) - 1) // s + 1


def _outputs(x_shape, w_shape, stride, padding, dilation):
    return tuple(
        output_extent(n, k, s, d, *p)
        for n, k, s, d, p in zip(x_shape[2:], w_shape[2:], stride, dilation, padding, strict=True)
    )


def _grouped(a, axis, groups):
    return a.reshape(*a.shape[:axis], groups, a.shape[axis] // groups, *a.shape[axis + 1 :])


def forward(x, w, stride, padding, dilation, groups=1, flip=False, padding_mode="zeros"):
    outputs = _outputs(x.shape, w.shape, stride, padding, dilation)
    x, v = padded(x, padding, padding_mode), np.flip(w, range(2, w.ndim)) if flip else w
    y = np.zeros((x.shape[0], groups, w.shape[0] // groups, *outputs), np.result_type(x, w))
    for tap, seen in taps(w.shape[2:], stride, dilation, outputs):
        xs = _grouped(x[(slice(None), slice(None), *seen)], 1, groups)
        y += np.einsum("ngc...,gfc->ngf...", xs, _grouped(v[(slice(None), slice(None), *tap)], 0, groups))
    return y.reshape(x.shape[0], w.shape[0], *outputs)


def data_grad(dy, w, x_shape, stride, padding, dilation, groups=1, flip=False, padding_mode="zeros"):
    """Return the adjoint with respect to x: products are added to a padded dx, which is then cropped or folded."""
    if padding_mode != "zeros":
        held = padded(np.arange(np.prod(x_shape)).reshape(x_shape), padding, padding_mode)
        terms = data_grad(dy, w, held.shape, stride, [(0, 0)] * len(padding), dilation, groups, flip)
        dx = np.zeros(x_shape, terms.dtype)
        np.add.at(dx.reshape(-1), held, terms)
        return dx
    v = np.conj(np.flip(w, range(2, w.ndim)) if flip else w)
    room = [(max(low, 0), max(high, 0)) for low, high in padding]
    extent = [n + low + high for n, (low, high) in zip(x_shape[2:], room, strict=True)]
    shift = [max(-low, 0) for low, _ in padding]  # a cropped x begins here
    dx = np.zeros((*x_shape[:2], *extent), np.result_type(dy, w))
    dyg = _grouped(dy, 1, groups)
    for tap, seen in taps(w.shape[2:], stride, dilation, dy.shape[2:]):
        seen = tuple(slice(a.start + o, a.stop + o, a.step) for a, o in zip(seen, shift, strict=True))
        share = np.einsum("ngf...,gfc->ngc...", dyg, _grouped(v[(slice(None), slice(None), *tap)], 0, groups))
        dx[(slice(None), slice(None), *seen)] += share.reshape(x_shape[0], x_shape[1], *dy.shape[2:])
    inside = tuple(slice(low, low + n) for n, (low, _) in zip(x_shape[2:], room, strict=True))
    return dx[(slice(None), slice(None), *inside)]


def weight_grad(dy, x, w_shape, stride, padding, dilation, groups=1, flip=False, padding_mode="zeros"):
    x = np.conj(padded(x, padding, padding_mode))
    dw = np.zeros(w_shape, np.result_type(dy, x))
    dyg = _grouped(dy, 1, groups)
    for tap, seen in taps(w_shape[2:], stride, dilation, dy.shape[2:]):
        xs = _grouped(x[(slice(None), slice(None), *seen)], 1, groups)
        o = int(np.prod(dy.shape[2:]))
        part = np.einsum("ngfo,ngco->gfc", dyg.reshape(*dyg.shape[:3], o), xs.reshape(*xs.shape[:3], o))
        dw[(slice(None), slice(None), *tap)] = part.reshape(w_shape[:2])
    return np.flip(dw, range(2, dw.ndim)) if flip else dw
