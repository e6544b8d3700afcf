"""Does `ntk(..., memory=)` keep to its budget? `python -m benchmarks.ntk.budgets`

Each case three times, with half, a tenth and a fiftieth of what the fastest way needs: a refusal,
or what XLA says of the peak and by how much the process grew, both over the budget. A process each.
"""

import sys
import tempfile
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.ntk import cases
from benchmarks.ntk.process import Failed, Worker

CASES, SHARES = ("a", "b", "c", "d", "e", "f"), (0.5, 0.1, 0.02)


def main(names: tuple[str, ...] = (), quick: bool = False) -> None:
    """Print the table.

    Parameters
    ----------
    names : tuple of str
        Cases to run; a to f if none is named.
    quick : bool
        A case and two budgets, tiny: does it run? No numbers to report.
    """
    table = Table(title="Peak of memory within a budget, MB", title_justify="left")
    for column in ("case", "budget", "XLA", "of budget", "process", "of budget", "XLA / process"):
        table.add_column(column, justify="left" if column == "case" else "right")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names or (CASES[:1] if quick else CASES):
            file = Path(folder) / f"{name}.npz"
            cases.write(name, file, quick=quick)
            for share in (0.9, 0.02) if quick else SHARES:
                task = {"case": name, "data": str(file), "share": share, "reduce": "none"}
                try:
                    with Worker(sys.executable, "budget_worker", task, 300.0) as worker:
                        found = worker.do("measure")
                except Failed as failure:
                    table.add_row(name, "", str(failure), failure.detail)
                    failures += 1
                    continue
                budget = found["budget"]
                if "refused" in found:
                    table.add_row(name, f"{budget:.0f}", "refused:", found["refused"])
                    continue
                table.add_row(
                    name,
                    f"{budget:.0f}",
                    f"{found['xla']:.0f}",
                    f"{found['xla'] / budget:.2f}",
                    f"{found['process']:.0f}",
                    f"{found['process'] / budget:.2f}",
                    f"{found['xla'] / found['process']:.2f}",
                )
            table.add_section()
    Console(width=110).print(table)
    if failures:
        raise SystemExit(f"{failures} of the workers have failed")


if __name__ == "__main__":
    tyro.cli(main)
