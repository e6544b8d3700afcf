"""What does a product with the kernel cost? `python -m benchmarks.large.products`

`K @ v` for each thing that can be kept between two products, over the gradient of the loss on the
same data, the median of pairs: the digits for a CNN and an MLP, and random images for a larger CNN.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.large.case import draw
from benchmarks.large.solves import problem
from lazyjax.operators import ntk_operator
from lazyjax.operators.jacobians import KEEPS


def seconds(call: Callable[[], jax.Array]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def main(pairs: int = 15, images: int = 1797, quick: bool = False) -> None:
    """Print the table.

    Parameters
    ----------
    pairs : int
        Alternating calls of a gradient and a product.
    images : int
        Of each model.
    quick : bool
        Few of both, of the MLP alone: does it run? No times to report.
    """
    pairs, images = (1, 100) if quick else (pairs, images)
    table = Table(title=f"Gradients that a product costs, {images} images, 10 outputs")
    for column in ("model", "gradient, ms", "keep", "K v", "trace kernel, v", "K V, 8 columns"):
        table.add_column(column, justify="left" if column in ("model", "keep") else "right")
    models = {
        "CNN, 16 and 32 channels, 8 x 8": lambda: problem("CNN", images)[:3],
        "CNN, 32 and 32 channels, 8 x 8 x 3": lambda: draw(images),
        "MLP 64-256-256-10": lambda: problem("MLP", images)[:3],
    }
    for name in list(models)[-1:] if quick else models:
        f, params, x = models[name]()
        x = jnp.asarray(x)
        y = jax.random.normal(jax.random.key(0), f(params, x).shape)
        slope = jax.jit(jax.grad(lambda w, x, y, f=f: jnp.mean((f(w, x) - y) ** 2)))
        gradient = partial(slope, params, x, y)
        for keep in KEEPS:
            full = ntk_operator(f, params, x, keep=keep)
            traced = ntk_operator(f, params, x, keep=keep, reduce="trace")
            block = jax.random.normal(jax.random.key(1), (full.shape[0], 8))
            products = (
                lambda A=full, v=block[:, 0]: A @ v,
                lambda A=traced, v=block[:images, 0]: A @ v,
                lambda A=full, v=block: A @ v,
            )
            cells, gradients = [], []
            for product in products:
                seconds(product)
                seconds(gradient)
                ratios = []
                for _ in range(pairs):
                    gradients.append(seconds(gradient))
                    ratios.append(seconds(product) / gradients[-1])
                cells.append(f"{np.median(ratios):.2f}")
            typical = f"{1e3 * np.median(gradients):.1f}"
            table.add_row(name if keep == "nothing" else "", typical, keep, *cells)
        table.add_section()
    console = Console(width=110)
    console.print(table)
    console.print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32")


if __name__ == "__main__":
    tyro.cli(main)
