"""How large, and at which rate? `python -m benchmarks.large.store`

The traced kernel of a CNN (two convolutions of 32 channels on 8 x 8 x 3, ten outputs) in float32,
stored within a budget; a process for each N. The rate is that of all operations counted in the
jaxprs of what ran, over the whole call, compilation and disk included, as a share of the rate of a
2048^3 product just before and after (the mean of both).
"""

import tempfile
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.large.case import answer, start

COLUMNS = (
    "N", "peak, GiB", "tile", "features, s", "contraction, s", "writing, s", "whole, s",
    "GFLOP/s", "product", "share",
)  # fmt: skip # to be read as a table


def main(
    sizes: tuple[int, ...] = (5_000, 10_000, 20_000),
    memory: str = "3GiB",
    folder: Path | None = None,
    quick: bool = False,
) -> None:
    """Print the table.

    Parameters
    ----------
    sizes : tuple of int
        Examples.
    memory : str
        Budget of the store; the process needs a few hundred MB more.
    folder : Path, optional
        Where the kernels are written for the time being.
    quick : bool
        One small kernel: does it run? No rate to report.
    """
    table = Table(title=f"The traced kernel on disk, within {memory}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for n in (600,) if quick else sizes:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            found = answer(start("store_worker", n, memory, f"{scratch}/k"))
        took, whole = found["seconds"], found["seconds"]["whole"]
        done = sum(found["operations"].values()) / whole
        product = sum(found["rates"]) / 2
        table.add_row(
            f"{n}",
            f"{found['peak']:.2f}",
            f"{found['tile']}{', spilled' if found['spilled'] else ''}",
            *(f"{took[name]:.1f}" for name in ("features", "contraction", "writing", "whole")),
            f"{done / 1e9:.0f}",
            f"{product / 1e9:.0f}",
            f"{done / product:.0%}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    tyro.cli(main)
