"""Do several devices and processes give the same kernel? `python -m benchmarks.large.devices`

The same kernel stored by one, two and eight devices of the host, and by two processes of one device
each (`jax.distributed`), compared with that of one device.
"""

import socket
import tempfile
import time

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.large.case import finish, start
from lazyjax.store import open_kernel


def stored(n: int, dtype: str, path: str, devices: int, processes: int) -> np.ndarray:
    """Store a kernel and read it."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if processes == 1:
        finish(start("device_worker", n, dtype, path, **flags))
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        workers = [
            start("device_worker", n, dtype, path, process, port, **flags)
            for process in range(processes)
        ]
        for worker in workers:
            finish(worker)
    return np.asarray(open_kernel(path))


def main(n: int = 600, quick: bool = False) -> None:
    """Print the table.

    Parameters
    ----------
    n : int
        Examples.
    quick : bool
        Few examples, in float32, one process and two: does it run? No numbers to report.
    """
    n = 120 if quick else n
    dtypes = ("float32",) if quick else ("float32", "float64")
    hosts = ((1, 1), (1, 2)) if quick else ((1, 1), (2, 1), (8, 1), (1, 2))
    table = Table(title=f"The kernel of {n} examples, 78 tiles", title_justify="left")
    for column in ("dtype", "processes", "devices each", "seconds", "largest difference"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for dtype in dtypes:
        one = None
        for devices, processes in hosts:
            with tempfile.TemporaryDirectory() as scratch:
                begin = time.perf_counter()
                found = stored(n, dtype, f"{scratch}/k", devices, processes)
            seconds = time.perf_counter() - begin
            one = found if one is None else one
            largest = np.max(np.abs(found - one)) / np.max(np.abs(one))
            table.add_row(dtype, f"{processes}", f"{devices}", f"{seconds:.1f}", f"{largest:.1e}")
    Console(width=110).print(table)


if __name__ == "__main__":
    tyro.cli(main)
