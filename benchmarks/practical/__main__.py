"""How much faster than the practical's own PyTorch loop? `python -m benchmarks.practical`

Section by section, the networks alone (no tangent models): the loop of the practical in PyTorch, on
one thread and on two, against `lazyjax.training` on the same machine in the same run; first in a
fresh process, compilation included, then again without it.
"""

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.practical import ours

QUICK = ("random_inits", "flow_vs_descent")


def measure_ours(names: Iterable[str], more: int) -> dict[str, list[float]]:
    """Time some sections: the first call, then the least of some more; `set_up` by itself."""
    begin = time.perf_counter()
    ours.set_up(names)
    times = {"set_up": [time.perf_counter() - begin]}
    for name in names:
        seconds = []
        for _ in range(1 + more):
            begin = time.perf_counter()
            ours.SECTIONS[name].run()
            seconds.append(time.perf_counter() - begin)
        times[name] = [seconds[0], min(seconds[1:])]
    return times


def _in_a_process(what: str, quick: bool) -> dict:
    command = [sys.executable, "-m", "benchmarks.practical", "--only", what]
    command += ["--quick"] if quick else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _better(names: Iterable[str], quick: bool) -> dict[str, tuple[float, bool, str]]:
    """Give PyTorch's seconds, whether they are scaled, and on how many threads it was faster."""
    sides = {threads: _in_a_process(f"torch-{threads}", quick) for threads in "12"}
    return {
        name: min((*times[name], threads) for threads, times in sides.items()) for name in names
    }


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def main(quick: bool = False, only: Literal["ours", "torch-1", "torch-2"] | None = None) -> None:
    """Print the table.

    Parameters
    ----------
    quick : bool
        Few sections, and PyTorch where it is installed: does it run? No times to report.
    only : str, optional
        One side, as JSON.
    """
    names = QUICK if quick else tuple(ours.SECTIONS)
    if only == "ours":
        print(json.dumps(measure_ours(names, 1 if quick else 3)))
        return
    there = find_spec("torch") is not None
    if not (there or quick):
        raise SystemExit('PyTorch is not installed. Use python -m pip install -e ".[bench]".')
    if only is not None:
        from benchmarks.practical import torch_loops

        longest = 100 if quick else torch_loops.LONGEST
        print(json.dumps(torch_loops.measure(int(only[-1]), names, longest)))
        return

    nothing = dict.fromkeys(names, (math.nan, False, "-"))
    theirs = _better(names, quick) if there else nothing
    lazy = _in_a_process("ours", quick)
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
        torch_seconds, scaled, threads = theirs[name]
        for i, seconds in enumerate((torch_seconds, first, again)):
            totals[i] += seconds
        table.add_row(
            name,
            f"{_number(torch_seconds, 1)}{' *' if scaled else ''}",
            threads,
            f"{first:.2f}",
            _number(torch_seconds / first, 0),
            f"{again:.3f}",
            _number(torch_seconds / again, 0),
        )
    table.add_section()
    table.add_row(
        "all",
        _number(totals[0], 1),
        "",
        f"{totals[1]:.2f}",
        _number(totals[0] / totals[1], 0),
        f"{totals[2]:.3f}",
        _number(totals[0] / totals[2], 0),
    )
    console = Console(width=110)
    console.print(table)
    if not there:
        console.print("PyTorch is not installed: ours alone.")
    if quick:
        console.print("A few sections (--quick), PyTorch on 100 steps: no times to report.")
    console.print(
        "* loops of more than 5 000 steps are timed on 5 000, after a warm-up, and scaled; of the\n"
        "99 dimensions of bias_complexity, 8 are timed. lazyjax runs every step; its times hold\n"
        "histories of loss and movement at every step, PyTorch's a copy of the output bias.\n"
        f"Not in the table: drawing data and initial weights, {set_up:.1f} s of lazyjax, nearly "
        "all\nof it compilation."
    )
    console.print(
        f"jax {jax.__version__}, jaxlib {version('jaxlib')}, Python {platform.python_version()}, "
        f"{platform.machine()}, float32"
    )


if __name__ == "__main__":
    tyro.cli(main)
