"""Two classifiers of images: a CNN on the digits, and a ResNet-18 on random labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lazyjax
from experiments.digits_kernel import CNN
from lazyjax.types import Dataset, ModelFunction, Params


class Case(NamedTuple):
    """What is trained."""

    f: ModelFunction
    params: Params
    data: Dataset
    optimizer: optax.GradientTransformation
    options: dict[str, Any]


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the features of a batch."""
        strides = (self.stride, self.stride)
        y = nn.relu(nn.GroupNorm(8)(nn.Conv(self.channels, (3, 3), strides, use_bias=False)(x)))
        y = nn.GroupNorm(8)(nn.Conv(self.channels, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), strides, use_bias=False)(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Eight blocks, of 16 channels at first; group normalisation, so that examples are apart."""

    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the outputs (N, 10) of images (N, 32, 32, 3)."""
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage in range(4):
            for block in range(2):
                x = Block(self.width * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def digits(steps: int) -> Case:
    """The CNN on 1437 digits, full batch, squared error: a closed form of 14 370 outputs."""
    from sklearn.datasets import load_digits

    held: Any = load_digits()
    x = jnp.asarray(held.images[:1437, ..., None] / 16, jnp.float32)
    y = jax.nn.one_hot(held.target[:1437], 10)
    f, params = lazyjax.from_linen(CNN((16, 32), 10), jax.random.key(0), x[:1])
    return Case(f, params, Dataset(x, y), optax.sgd(0.05), {"steps": steps})


def resnet(steps: int, examples: int = 2000, batch_size: int = 200) -> Case:
    """A ResNet-18 of width 16 on 2000 images of 32 x 32 x 3 with random labels, mini-batches."""
    image, label, init, batches = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(image, (examples, 32, 32, 3))
    y = jax.random.randint(label, (examples,), 0, 10)
    f, params = lazyjax.from_linen(ResNet18(), init, x[:1])
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "key": batches,
        "loss": optax.losses.softmax_cross_entropy_with_integer_labels,
    }
    return Case(f, params, Dataset(x, y), optax.sgd(0.02), options)


CASES: dict[str, Callable[[int], Case]] = {"digits": digits, "resnet": resnet}
