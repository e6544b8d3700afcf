"""The slow reference of convolutions in the limit: covariances of all positions, by indices.

A network is a tuple of layers: a record, or the name of a row of `FUNCTIONS`.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

WIDTH = 8
W, B = 1.3, 0.2  # variances, of a product with channels of size 1 and of a bias


class Field(NamedTuple):
    """E h h' and E <dh, dh'> of one channel, (n, m, s, t), all positions on one axis."""

    k: np.ndarray
    theta: np.ndarray
    positions: tuple[int, ...]
    channels: int


class Conv(NamedTuple):
    """A convolution; of a window without axes a dense layer."""

    window: tuple[int, ...] = ()
    strides: Any = 1
    padding: Any = "VALID"
    spread: Any = 1  # of the input, by zeros
    dilation: Any = 1  # of the window
    groups: int = 1
    bias: bool = True


class Pool(NamedTuple):
    window: tuple[int, ...]
    strides: Any = None
    padding: Any = "VALID"
    count_include_pad: bool = True


class Block(NamedTuple):
    """The sum of two branches."""

    inside: tuple[Any, ...]
    beside: tuple[Any, ...] = ()


def seen_along(n, size, stride, padding, spread, step):
    """Give, of each output along one axis, which of n inputs its window sees; None is a 0."""
    reach, length = (size - 1) * step, (n - 1) * spread + 1
    low, high = (0, 0) if isinstance(padding, str) else padding
    if padding == "SAME":
        lost = max((math.ceil(n / stride) - 1) * stride + reach + 1 - n, 0)
        low, high = lost // 2, lost - lost // 2
    elif padding in ("CIRCULAR", "REFLECT"):
        low, high = reach // 2, reach - reach // 2
    elif padding == "CAUSAL":
        low = reach

    def source(p):
        if padding == "CIRCULAR":
            return p % n
        if padding == "REFLECT":
            return n - 1 - abs(n - 1 - abs(p))
        return p // spread if 0 <= p < length and p % spread == 0 else None

    starts = range(-low, length + high - reach, stride)
    return [[source(start + i * step) for i in range(size)] for start in starts]


def seen(layer, positions):
    """Give the numbers of the positions that each output sees, (outputs, window), -1 for a 0."""

    def along(option):
        return option if isinstance(option, list | tuple) else [option] * len(positions)

    options = (layer.strides, layer.padding, layer.spread, layer.dilation)
    axes = zip(positions, layer.window, *map(along, options), strict=True)
    rows = [seen_along(*axis) for axis in axes]
    grid = np.arange(math.prod(positions)).reshape(positions)
    found = [
        [-1 if None in place else grid[place] for place in itertools.product(*taps)]
        for taps in itertools.product(*rows)
    ]
    return np.array(found), tuple(map(len, rows))


def of_conv(layer, h, factored):
    at, positions = seen(layer, h.positions)
    edge = [(0, 0), (0, 0), (0, 1), (0, 1)]  # one more position, -1, that is 0
    k, theta = (np.pad(a, edge) for a in (h.k, h.theta))
    k, theta = (sum(a[:, :, i][..., i] for i in at.T) for a in (k, theta))
    count = h.channels // layer.groups
    w, b = W / count / at.shape[1], B * layer.bias
    theta = w * count * theta + (w * count * k + b if factored else count * k + layer.bias)
    return Field(w * count * k + b, theta, positions, WIDTH)


def of_pool(layer, h):
    at, positions = seen(Conv(layer.window, layer.strides or 1, layer.padding), h.positions)
    mean = np.zeros((len(at), math.prod(h.positions)))
    for row, places in zip(mean, at, strict=True):
        inside = places[places >= 0]
        row[inside] = 1 / (places.size if layer.count_include_pad else inside.size)
    return Field(mean @ h.k @ mean.T, mean @ h.theta @ mean.T, positions, h.channels)


def of_relu(h):
    variance = np.einsum("nnss->ns", h.k)
    product = variance[:, None, :, None] * variance[None, :, None, :]
    rest = np.sqrt(np.maximum(product - h.k**2, 0))
    angle = np.pi - np.arctan2(rest, h.k)
    return h._replace(k=(rest + angle * h.k) / (2 * np.pi), theta=h.theta * angle / (2 * np.pi))


def of_erf(h):
    variance = 1 + 2 * np.einsum("nnss->ns", h.k)
    product = variance[:, None, :, None] * variance[None, :, None, :]
    slope = 4 / np.pi / np.sqrt(product - 4 * h.k**2)
    return h._replace(k=2 / np.pi * np.arcsin(2 * h.k / np.sqrt(product)), theta=h.theta * slope)


def of_flat(h):
    k, theta = (np.einsum("nmss->nm", a)[..., None, None] / a.shape[-1] for a in h[:2])
    return Field(k, theta, (), h.channels * math.prod(h.positions))


def of_mean(h):
    k, theta = (a.mean((2, 3), keepdims=True) for a in h[:2])
    return Field(k, theta, (), h.channels)


FUNCTIONS = {
    "relu": (jax.nn.relu, of_relu),
    "erf": (jax.scipy.special.erf, of_erf),
    "flatten": (lambda x: x.reshape(len(x), -1), of_flat),
    "mean": (lambda x: x.mean(tuple(range(1, x.ndim - 1))), of_mean),
}


def field_of(layers, h, factored):
    for layer in layers:
        if isinstance(layer, Block):
            one, other = (field_of(branch, h, factored) for branch in layer)
            h = one._replace(k=one.k + other.k, theta=one.theta + other.theta)
        elif isinstance(layer, str):
            h = FUNCTIONS[layer][1](h)
        else:
            h = of_pool(layer, h) if isinstance(layer, Pool) else of_conv(layer, h, factored)
    return h


def reference(layers, x, *, factored):
    """Give E f f' and E <df, df'> of all examples with all.

    Weights have the variance W over their number, in factors of f (`factored`, NTK
    parametrisation) or at the start (standard parametrisation), and biases B.
    """
    flat = np.asarray(x).reshape(len(x), -1, x.shape[-1])
    k = np.einsum("nsc,mtc->nmst", flat, flat) / x.shape[-1]
    h = field_of(layers, Field(k, 0 * k, x.shape[1:-1], x.shape[-1]), factored)
    return h.k[..., 0, 0], h.theta[..., 0, 0]
