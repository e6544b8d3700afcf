"""Does a killed store go on with the same bits? `python -m benchmarks.large.kills`

One store in peace. Another is killed (SIGKILL) at random moments of its run, twice while the file
of a chunk is being written, and goes on each time. Then all files of both arrays are compared.
"""

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks.large.case import finish, start
from lazyjax.store import files

CONSOLE = Console(width=110)


def chunks(path: Path) -> dict[str, bytes]:
    """Read all files of an array, a half-written one under its own name among them."""
    found = [file for file in (path / "c").rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def files_of(path: Path) -> int:
    """Count the files that are there: chunks and features."""
    return sum(
        file.is_file() for folder in ("c", "features") for file in (path / folder).rglob("*")
    )


def is_writing(process: subprocess.Popen) -> bool:
    """Tell whether a chunk is being written: under another name, until it is whole."""
    try:
        opened = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process.pid}/fd")]
    except OSError:  # closed meanwhile
        return False
    return any("__lock" in name for name in opened)


def kill(process: subprocess.Popen, when: Callable[[], bool]) -> bool:
    """Kill a worker at a moment; tell whether it was still at work."""
    while process.poll() is None and not when():
        time.sleep(0.0002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def main(
    n: int = 2_400, memory: str = "300MiB", kills: int = 20, seed: int = 0, quick: bool = False
) -> None:
    """Say what came of it.

    Parameters
    ----------
    n : int
        Examples.
    memory : str
        Budget of the store, so small that features are spilled.
    kills : int
        How often.
    seed : int
        Of the moments.
    quick : bool
        A small kernel, killed once: does it run? No numbers to report.
    """
    n, memory, kills = (240, "40MiB", 1) if quick else (n, memory, kills)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        peace, path, log = (Path(scratch) / name for name in ("peace", "killed", "log"))
        finish(start("kill_worker", n, memory, peace, f"{log}.peace"))
        timings = json.loads((peace / files.TIMINGS).read_text())
        work = sum(one["seconds"] for one in timings.values())
        spilled = json.loads((peace / files.RECIPE).read_text())["spilled"]
        while_writing = rng.sample(range(kills // 2, kills), min(2, (kills + 1) // 2))
        done = torn = 0
        for number in range(kills):
            before = files_of(path)
            process = start("kill_worker", n, memory, path, log)
            if number in while_writing:
                done += kill(process, lambda process=process: is_writing(process))
                halves = [file for file in path.rglob("*__lock") if file.stat().st_size]
                torn += len(halves) > 0
            else:
                while process.poll() is None and files_of(path) <= before:
                    time.sleep(0.005)
                moment = time.perf_counter() + rng.uniform(0.0, 1.4 * work / kills)
                done += kill(process, lambda moment=moment: time.perf_counter() > moment)
            CONSOLE.print(f"kill {number + 1:2}: {len(chunks(path))} chunks are there")
        finish(start("kill_worker", n, memory, path, log))
        one, other = chunks(peace), chunks(path)
        tiles, computed = (len(Path(f).read_text().split()) for f in (f"{log}.peace", log))
    CONSOLE.print(
        f"N = {n}, {tiles} tiles, features {'spilled' if spilled else 'made again'}, {work:.1f} s "
        f"of work. Killed {done} times at work, {torn} of these with a chunk half written. "
        f"{computed - tiles} tiles were computed again. The {len(one)} chunks are "
        f"{'the same, bit by bit' if one == other else 'NOT the same'}."
    )
    if one != other:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
