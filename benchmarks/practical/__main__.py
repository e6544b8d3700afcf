"""How much faster than the practical's own PyTorch loop? `python -m benchmarks.practical`

Section by section, the networks alone (no tangent models): the loop of the practical in PyTorch, on
one thread and on two, against `lazyjax.training` on the same machine in the same run; first in a
fresh process, compilation included, then again without it.
"""

import argparse
import json
import platform
import subprocess
import sys
import time

import jax
import jaxlib
from rich.console import Console
from rich.table import Table

from benchmarks.practical import ours


def measure_ours() -> dict[str, list[float]]:
    """Time every section: the first call, then the least of three more; `set_up` by itself."""
    begin = time.perf_counter()
    ours.set_up()
    times = {"set_up": [time.perf_counter() - begin]}
    for name, section in ours.SECTIONS.items():
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            section()
            seconds.append(time.perf_counter() - begin)
        times[name] = [seconds[0], min(seconds[1:])]
    return times


def _in_a_process(what: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.practical", "--only", what]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["ours", "torch-1", "torch-2"], help="one side, as JSON")
    only = parser.parse_args().only
    if only == "ours":
        print(json.dumps(measure_ours()))
        return
    if only is not None:
        from benchmarks.practical import torch_loops

        print(json.dumps(torch_loops.measure(int(only[-1]))))
        return

    sides = [_in_a_process(f"torch-{threads}") for threads in (1, 2)]
    lazy = _in_a_process("ours")
    (set_up,) = lazy.pop("set_up")
    table = Table(title="Seconds for the networks of the practical, section by section")
    for column in (
        "experiment",
        "PyTorch",
        "threads",
        "lazyjax, first call",
        "ratio",
        "lazyjax, compiled",
        "ratio",
    ):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    totals = [0.0, 0.0, 0.0]
    for name, (first, again) in lazy.items():
        threads = min((1, 2), key=lambda t: sides[t - 1][name][0])
        torch_seconds, scaled = sides[threads - 1][name]
        for i, seconds in enumerate((torch_seconds, first, again)):
            totals[i] += seconds
        table.add_row(
            name,
            f"{torch_seconds:.1f}{' *' if scaled else ''}",
            str(threads),
            f"{first:.2f}",
            f"{torch_seconds / first:.0f}",
            f"{again:.3f}",
            f"{torch_seconds / again:.0f}",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{totals[0]:.1f}",
        "",
        f"{totals[1]:.2f}",
        f"{totals[0] / totals[1]:.0f}",
        f"{totals[2]:.3f}",
        f"{totals[0] / totals[2]:.0f}",
    )
    console = Console(width=110)
    console.print(table)
    console.print(
        "* loops of more than 5 000 steps are timed on 5 000, after a warm-up, and scaled; of the\n"
        "99 dimensions of bias_complexity, 8 are timed. lazyjax runs every step; its times hold\n"
        "histories of loss and movement at every step, PyTorch's a copy of the output bias.\n"
        f"Not in the table: drawing data and initial weights, {set_up:.1f} s of lazyjax, nearly "
        "all\nof it compilation."
    )
    console.print(
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, float32"
    )


if __name__ == "__main__":
    main()
