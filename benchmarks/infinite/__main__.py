"""Are the limits those of neural-tangents, and how fast? `python -m benchmarks.infinite`

28 networks, float64: the largest difference over the largest entry, of both kernels, of a batch
with itself and with another; neural-tangents 0.6.5 in an environment of its own. Then three
networks in float32: the least time of five calls, compilation excluded, in processes of their own,
in turn.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.infinite.cases import CASES, TIMED
from benchmarks.ntk.environment import prepare


def run(python: Path | str, worker: str, what: str, out: Path, names: list[str]) -> dict:
    """Run a worker; give what it wrote."""
    path = out / f"{worker}_{what}.npz"
    command = [str(python), "-m", f"benchmarks.infinite.{worker}", what, str(path), *names]
    subprocess.run(command, check=True)
    with np.load(path) as found:
        return dict(found)


def main(rivals: Path | None = None, quick: bool = False) -> None:
    """Print both tables.

    Parameters
    ----------
    rivals
        folder of the environment of neural-tangents, made there if it is not; without it only ours
    quick
        three networks, and no times
    """
    names = ["relu 1", "gelu 3", "conv 1-D"] if quick else list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if rivals is not None:
            prepare(rivals)
        python = None if rivals is None else rivals / "bin" / "python"
        ours = run(sys.executable, "ours", "kernels", out, names)
        theirs = run(python, "neural_tangents_worker", "kernels", out, names) if python else {}
        table = Table(title="differences from neural-tangents, relative")
        for head in ("network", "nngp", "ntk", "nngp, x2", "ntk, x2", "asked"):
            table.add_column(head)
        for name in names:
            cells = []
            for key in (f"{name}|{kind}" for kind in ("nngp", "ntk", "nngp2", "ntk2")):
                there = theirs.get(key)
                gap = None if there is None else np.abs(ours[key] - there).max()
                cells.append("" if gap is None else f"{gap / np.abs(there).max():.1e}")
            table.add_row(name, *cells, f"{CASES[name].near:.0e}")
        console = Console(width=100)
        console.print(table)
        if quick:
            return
        table = Table(title="milliseconds")
        for head in (
            "network",
            "N",
            "neural-tangents",
            "ours, x2",
            "ratio",
            "ours, x2=None",
            "ratio",
        ):
            table.add_column(head)
        least: dict[str, float] = {}
        for _ in range(3):  # in turn
            for worker, path in (("ours", sys.executable), ("neural_tangents_worker", python)):
                if path is not None:
                    for key, value in run(path, worker, "times", out, list(TIMED)).items():
                        least[f"{worker}|{key}"] = min(
                            float(value), least.get(f"{worker}|{key}", np.inf)
                        )
        for name, (_, n, _) in TIMED.items():
            one, alone = (1e3 * least[f"ours|{name}|{kind}"] for kind in ("x2", "alone"))
            rival = 1e3 * least.get(f"neural_tangents_worker|{name}|x2", np.nan)
            cells = [f"{v:.0f}" for v in (rival, one)]
            table.add_row(
                name, str(n), *cells, f"{rival / one:.2f}", f"{alone:.0f}", f"{rival / alone:.2f}"
            )
        console.print(table)
        console.print(json.dumps({"numpy": np.__version__, "python": sys.version.split()[0]}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
