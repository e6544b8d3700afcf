"""What would the kernel of CIFAR-10 and a ResNet-18 cost? `python -m benchmarks.large.paper`

On paper: operations and bytes are counted in the jaxpr of the model, as `kernel_store` counts them,
each part in the order with the fewest operations; seconds are those over a rate that is assumed.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax.tree_util import Partial
from rich.console import Console
from rich.table import Table

from benchmarks.large.case import draw
from lazyjax.costs import operations
from lazyjax.factors import Shape, Treatment, model_of, plan
from lazyjax.kernels.orders import ORDERS, treatment
from lazyjax.memory import format_bytes
from lazyjax.models import from_linen

OUTPUTS = 10


@dataclass(frozen=True, kw_only=True)
class Config:
    """The assumptions."""

    examples: int = 50_000
    """Images."""
    rate: float = 4e13
    """Operations a second of float32 matrix products without TF32, on one device."""
    share: float = 0.6
    """Of that rate, over the whole run: what is asked of two CPU cores, and measured there."""
    features: float = 1e13
    """Operations a second of features: small convolutions."""
    read: float = 5e9
    """Bytes a second of features from the disk, one device."""
    memory: float = 64e9
    """Bytes for the features that a device holds."""
    devices: tuple[int, ...] = (1, 64)
    """How many; they share out the rows of tiles."""
    quick: bool = False
    """A ResNet of two narrow stages: does it run? No numbers to report."""


conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.zeros)  # nothing is computed


class Block(nn.Module):
    """A basic block."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        y = conv(self.channels, (3, 3), strides=strides)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
        y = conv(self.channels, (3, 3))(y)
        y = nn.BatchNorm(use_running_average=True)(y)
        if x.shape != y.shape:
            x = conv(self.channels, (1, 1), strides=strides)(x)
            x = nn.BatchNorm(use_running_average=True)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet-18 for images of 32 x 32: at first stride 1 and no pooling."""

    stages: tuple[int, ...] = (64, 128, 256, 512)  # channels

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first = self.stages[0]
        x = conv(first, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        for channels in self.stages:
            x = Block(channels, 1 if channels == first else 2)(x)
            x = Block(channels, 1)(x)
        return nn.Dense(OUTPUTS)(x.mean((1, 2)))


def models(quick: bool) -> dict[str, tuple[Any, Any, jax.Array]]:
    """Give f, params and one image of each model; the first is that of the measured store."""
    f, params, small = draw(1)
    large = jnp.zeros((1, 32, 32, 3))
    resnet = ResNet((8, 16)) if quick else ResNet()
    return {
        "CNN, 2 x 32 channels, 8 x 8": (f, params, jnp.asarray(small)),
        "CNN, 2 x 32 channels, 32 x 32": (f, params, large),
        f"ResNet-{2 + 4 * len(resnet.stages)}, 32 x 32": (
            *from_linen(resnet, jax.random.key(0), large),
            large,
        ),
    }


def fewest(shape: Shape) -> Treatment:
    """Name the order with the fewest operations for a pair of examples."""
    allowed = [name for name, order in ORDERS.items() if order.admits(shape)]
    return treatment(min(allowed, key=lambda name: ORDERS[name].cost(shape, "trace").pair))


@dataclass(frozen=True)
class Count:
    """What one model costs."""

    parameters: int
    pair: float  # multiply-adds
    example: float  # multiply-adds of its features
    kept: float  # bytes of them


def count(f: Any, params: Any, x: jax.Array) -> Count:
    """Count the traced kernel of a model."""
    mask = (True,) * len(jax.tree.leaves(params))
    model = model_of(Partial(f), params, x, mask, leaf=0, outputs=None, summed=False)
    found = plan(model.jaxpr, len(model.w), fewest, apart=False)
    plain = OUTPUTS * sum(model.w[leaf].size for leaf in found.plain)
    pair, kept = float(plain), float(plain)
    example = (1 + 2 * OUTPUTS) * operations(model.jaxpr.jaxpr)
    for shape, own in zip(found.shapes, found.treatments, strict=True):
        cost = ORDERS[own.group].cost(shape, "trace")
        pair, example = pair + cost.pair, example + cost.example
        kept += shape.jacobian if own.formed else shape.factors
    return Count(sum(w.size for w in model.w), pair, example, 4 * kept)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def main(config: Config) -> None:
    """Print the table."""
    n = config.examples
    table = Table(title=f"The traced kernel of {n} images, on paper", title_justify="left")
    columns = ("model", "parameters", "a pair", "an example", "kept", "devices", "panels")
    for column in (*columns, "features", "of columns", "contraction", "sum"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model in models(config.quick).items():
        own = count(*model)
        made, read = 2 * own.example / config.features, own.kept / config.read  # an example
        for devices in config.devices:
            rows = n / devices
            panels = max(1.0, rows * own.kept / config.memory)
            features = rows * made
            columns = panels * n / 2 * min(made, read)  # half of them pass a panel
            contraction = rows * n * own.pair / (config.rate * config.share)
            table.add_row(
                name if devices == config.devices[0] else "",
                f"{own.parameters:.2e}",
                f"{own.pair:.1e}",
                f"{own.example:.1e}",
                format_bytes(own.kept),
                str(devices),
                f"{panels:.0f}",
                _time(features),
                f"{_time(columns)} {'made' if made < read else 'read'}",
                _time(contraction),
                _time(features + columns + contraction),
            )
    console = Console(width=150)
    console.print(table)
    console.print(
        f"Multiply-adds for a pair and for the features of an example, which take `kept`. A panel "
        "of rows holds its features on a device while those of the columns pass, made again or "
        f"read, whichever is faster. The kernel: {format_bytes(4 * n**2)}. Assumed of a device: "
        f"{config.rate:.0e} operations a second at {config.share:.0%}, {config.features:.0e} for "
        f"features, {config.read:.0e} bytes a second from the disk, {config.memory:.0e} bytes held."
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
