"""The networks: each once as a function of weights, and once in the layers of the rival.

A row's networks have the same limit. What is here needs jax alone, so that both environments can
read it.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 8  # of every hidden layer: only that it is one matters
W, B = 1.5, 0.3  # the scales of weights and of biases


class Case(NamedTuple):
    f: Callable[[Any, Any], Any]
    shapes: list[tuple[int, ...]]
    theirs: Callable[[Any], Any]  # of neural_tangents.stax
    x: tuple[int, ...] = (5,)  # of one example
    near: float = 1e-10  # the largest relative difference


def dense(x, w, b=None):
    y = W * (x @ w) / np.sqrt(w.shape[0])
    return y if b is None else y + B * b


def conv(x, w, b=None, *, padding="SAME", strides=None, dilation=None):
    places = "HW"[: w.ndim - 2]
    if padding == "CIRCULAR":
        x = jnp.pad(x, [(0, 0), *[(n // 2, n // 2) for n in w.shape[:-2]], (0, 0)], mode="wrap")
        padding = "VALID"
    y = jax.lax.conv_general_dilated(
        x,
        w,
        strides or (1,) * len(places),
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{places}C", f"{places}IO", f"N{places}C"),
    )
    y = W * y / np.sqrt(np.prod(w.shape[:-1]))
    return y if b is None else y + B * b


def normed(x, axes=(-1,)):
    mean = jnp.mean(x, axes, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.mean(jnp.square(x - mean), axes, keepdims=True) + 1e-12)


def mlp_shapes(depth: int, d: int = 5) -> list[tuple[int, ...]]:
    sizes = [d, *[WIDTH] * depth, 1]
    return [s for a, b in pairwise(sizes) for s in ((a, b), (b,))]


def mlp(phi) -> Callable[[Any, Any], Any]:
    def f(w, x):
        for i in range(0, len(w), 2):
            x = dense(phi(x) if i else x, w[i], w[i + 1])
        return x

    return f


def layers(depth: int, phi: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def network(stax):
        hidden = [part for _ in range(depth) for part in (D(stax), phi(stax))]
        return stax.serial(*hidden, D(stax, 1))

    return network


def D(stax, n=WIDTH):
    return stax.Dense(n, W_std=W, b_std=B)


def C(stax, window=(3, 3), strides=None, padding="SAME", n=WIDTH):
    return stax.Conv(n, window, strides, padding, W_std=W, b_std=B)


def gelu(z):
    return jax.nn.gelu(z, approximate=False)


def fully_connected(depth, phi, theirs, near=1e-10) -> Case:
    return Case(mlp(phi), mlp_shapes(depth), layers(depth, theirs), near=near)


def residual(w, x):
    x = dense(x, w[0], w[1])
    for i in range(2, 8, 2):
        x = x + dense(jax.nn.relu(x), w[i], w[i + 1])
    return dense(jax.nn.relu(x), w[8], w[9])


def _residual(stax):
    block = stax.serial(
        stax.FanOut(2),
        stax.parallel(stax.Identity(), stax.serial(stax.Relu(), D(stax))),
        stax.FanInSum(),
    )
    return stax.serial(D(stax), block, block, block, stax.Relu(), D(stax, 1))


def concatenated(w, x):
    x = jnp.concatenate([gelu(dense(x, w[0])), jax.nn.relu(dense(x, w[1]))], -1)
    return dense(x, w[2])


def _concatenated(stax):
    def one(phi, n):
        return stax.serial(stax.Dense(n, W_std=W, b_std=0.0), phi)

    return stax.serial(
        stax.FanOut(2),
        stax.parallel(one(stax.Gelu(), WIDTH), one(stax.Relu(), 2 * WIDTH)),
        stax.FanInConcat(),
        stax.Dense(1, W_std=W, b_std=0.0),
    )


def layer_norm(w, x):
    x = jax.nn.relu(normed(dense(x, w[0], w[1])))
    x = gelu(normed(dense(x, w[2], w[3])))
    return dense(x, w[4], w[5])


def _layer_norm(stax):
    return stax.serial(
        D(stax), stax.LayerNorm(), stax.Relu(), D(stax), stax.LayerNorm(), stax.Gelu(), D(stax, 1)
    )


def normed_after(w, x):
    x = normed(jax.nn.relu(dense(x, w[0], w[1])))
    return dense(normed(jax.nn.relu(dense(x, w[2], w[3]))), w[4], w[5])


def _normed_after(stax):
    return stax.serial(
        D(stax), stax.Relu(), stax.LayerNorm(), D(stax), stax.Relu(), stax.LayerNorm(), D(stax, 1)
    )


def conv_shapes(*windows: tuple[int, ...], channels: int = 3, last: int = WIDTH):
    shapes: list[tuple[int, ...]] = []
    for window in windows:
        shapes += [(*window, channels, WIDTH), (WIDTH,)]
        channels = WIDTH
    return [*shapes, (last, 1), (1,)]


def cnn(readout, phi=jax.nn.relu, **options):
    def f(w, x):
        for i in range(0, len(w) - 2, 2):
            x = phi(conv(x, w[i], w[i + 1], **options))
        return dense(readout(x), w[-2], w[-1])

    return f


def flat(x):
    return x.reshape(len(x), -1)


def pooled(x):
    return jnp.mean(x, tuple(range(1, x.ndim - 1)))


def average(x, n=2, stride=2):
    ones = (1, n, n, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, ones, (1, stride, stride, 1), "VALID") / n**2


def _cnn(depth, readout, phi="Relu", **options):
    def network(stax):
        parts = [part for _ in range(depth) for part in (C(stax, **options), getattr(stax, phi)())]
        return stax.serial(*parts, getattr(stax, readout)(), D(stax, 1))

    return network


def locally_pooled(w, x):
    x = average(jax.nn.relu(conv(x, w[0], w[1])))
    x = average(jax.nn.relu(conv(x, w[2], w[3])), 3, 1)
    return dense(flat(x), w[4], w[5])


def _locally_pooled(stax):
    return stax.serial(
        C(stax),
        stax.Relu(),
        stax.AvgPool((2, 2), (2, 2)),
        C(stax),
        stax.Relu(),
        stax.AvgPool((3, 3), (1, 1)),
        stax.Flatten(),
        D(stax, 1),
    )


def wide_resnet(w, x):
    x = conv(x, w[0], w[1])
    y = conv(jax.nn.relu(x), w[2], w[3], strides=(2, 2))
    y = conv(jax.nn.relu(y), w[4], w[5])
    x = y + conv(x, w[6], w[7], strides=(2, 2))
    x = x + conv(jax.nn.relu(x), w[8], w[9])
    return dense(pooled(jax.nn.relu(x)), w[10], w[11])


def _wide_resnet(stax):
    first = stax.serial(
        stax.FanOut(2),
        stax.parallel(
            stax.serial(stax.Relu(), C(stax, strides=(2, 2)), stax.Relu(), C(stax)),
            C(stax, strides=(2, 2)),
        ),
        stax.FanInSum(),
    )
    second = stax.serial(
        stax.FanOut(2),
        stax.parallel(stax.Identity(), stax.serial(stax.Relu(), C(stax))),
        stax.FanInSum(),
    )
    return stax.serial(C(stax), first, second, stax.Relu(), stax.GlobalAvgPool(), D(stax, 1))


def normed_conv(w, x):
    x = jax.nn.relu(normed(conv(x, w[0], w[1])))
    x = jax.nn.relu(normed(conv(x, w[2], w[3]), (-3, -2, -1)))
    return dense(pooled(x), w[4], w[5])


def _normed_conv(stax):
    return stax.serial(
        C(stax),
        stax.LayerNorm(axis=-1),
        stax.Relu(),
        C(stax),
        stax.LayerNorm(axis=(1, 2, 3)),
        stax.Relu(),
        stax.GlobalAvgPool(),
        D(stax, 1),
    )


IMAGE, LINE = (6, 6, 3), (9, 3)
TWO, THREE = ((3, 3),) * 2, ((3, 3),) * 3

CASES: dict[str, Case] = {
    "relu 1": fully_connected(1, jax.nn.relu, lambda s: s.Relu()),
    "relu 3": fully_connected(3, jax.nn.relu, lambda s: s.Relu()),
    "relu 10": fully_connected(10, jax.nn.relu, lambda s: s.Relu()),
    "leaky relu 3": fully_connected(
        3, lambda z: jax.nn.leaky_relu(z, 0.2), lambda s: s.LeakyRelu(0.2)
    ),
    "abs 3": fully_connected(3, jnp.abs, lambda s: s.Abs()),
    "abs 6": fully_connected(6, jnp.abs, lambda s: s.Abs()),
    "erf 5": fully_connected(5, jax.scipy.special.erf, lambda s: s.Erf()),
    "sin 3": fully_connected(3, jnp.sin, lambda s: s.Sin()),
    "cos 3": fully_connected(3, jnp.cos, lambda s: s.Cos()),
    "gelu 3": fully_connected(3, gelu, lambda s: s.Gelu()),
    "square 2": fully_connected(2, jnp.square, lambda s: s.Monomial(2)),
    "cube 1": fully_connected(1, lambda z: z**3, lambda s: s.Monomial(3)),
    "polynomial 1": fully_connected(
        1, lambda z: 0.5 + z - 0.3 * z**2, lambda s: s.Polynomial([0.5, 1.0, -0.3])
    ),
    "identity 2": fully_connected(2, lambda z: z, lambda s: s.Identity()),
    "residual": Case(residual, [*mlp_shapes(4)], _residual),
    "concatenated": Case(concatenated, [(5, WIDTH), (5, 2 * WIDTH), (3 * WIDTH, 1)], _concatenated),
    "layer norm": Case(layer_norm, mlp_shapes(2), _layer_norm, near=1e-8),
    "normed after relu": Case(normed_after, mlp_shapes(2), _normed_after, near=1e-8),
    "conv flat": Case(cnn(flat), conv_shapes(*THREE, last=36 * WIDTH), _cnn(3, "Flatten"), IMAGE),
    "conv pooled": Case(cnn(pooled), conv_shapes(*THREE), _cnn(3, "GlobalAvgPool"), IMAGE),
    "conv valid": Case(
        cnn(flat, padding="VALID"),
        conv_shapes(*TWO, last=4 * WIDTH),
        _cnn(2, "Flatten", padding="VALID"),
        IMAGE,
    ),
    "conv circular": Case(
        cnn(pooled, padding="CIRCULAR"),
        conv_shapes(*TWO),
        _cnn(2, "GlobalAvgPool", padding="CIRCULAR"),
        IMAGE,
    ),
    "conv strided": Case(
        cnn(pooled, strides=(2, 2)),
        conv_shapes(*TWO),
        _cnn(2, "GlobalAvgPool", strides=(2, 2)),
        (8, 8, 3),
    ),
    "conv 1-D": Case(
        cnn(pooled, gelu),
        conv_shapes((3,), (3,)),
        _cnn(2, "GlobalAvgPool", "Gelu", window=(3,)),
        LINE,
    ),
    "conv 1-D circular flat": Case(
        cnn(flat, gelu, padding="CIRCULAR"),
        conv_shapes((3,), (3,), last=9 * WIDTH),
        _cnn(2, "Flatten", "Gelu", window=(3,), padding="CIRCULAR"),
        LINE,
    ),
    "local pooling": Case(locally_pooled, conv_shapes(*TWO, last=WIDTH), _locally_pooled, IMAGE),
    "wide resnet": Case(
        wide_resnet,
        [
            *conv_shapes((3, 3), (3, 3), (3, 3))[:6],
            *[(3, 3, WIDTH, WIDTH), (WIDTH,)] * 2,
            (WIDTH, 1),
            (1,),
        ],
        _wide_resnet,
        IMAGE,
    ),
    "conv layer norm": Case(normed_conv, conv_shapes(*TWO), _normed_conv, IMAGE, near=1e-8),
}


TIMED: dict[str, tuple[Case, int, tuple[int, ...]]] = {
    "fully connected, 3 layers": (
        Case(mlp(jax.nn.relu), mlp_shapes(3, 784), layers(3, lambda s: s.Relu())),
        2000,
        (784,),
    ),
    "5 convolutions, flat": (
        Case(cnn(flat), conv_shapes(*((3, 3),) * 5, last=256 * WIDTH), _cnn(5, "Flatten")),
        40,
        (16, 16, 3),
    ),
    "5 convolutions, pooled": (
        Case(cnn(pooled), conv_shapes(*((3, 3),) * 5), _cnn(5, "GlobalAvgPool")),
        10,
        (16, 16, 3),
    ),
}


def random_inputs(n: int, shape: tuple[int, ...]) -> np.ndarray:
    """Give a batch in float32."""
    return np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)


def least(call: Callable[[], Any], rounds: int = 5) -> float:
    """Give the least time of some calls, after a first one."""
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def inputs(case: Case, n: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Give a batch of examples, and one of others."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, *case.x)), rng.normal(size=(n - 1, *case.x))
