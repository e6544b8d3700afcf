"""The parent's end of the line: a worker with a limit on memory and time."""

import contextlib
import json
import os
import selectors
import subprocess
import time
from pathlib import Path
from typing import Any

KILLED_MB = 14_000  # resident memory at which a worker is killed
ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """The worker did not do it; the text is its entry in the table, `detail` the long story."""

    def __init__(self, text: str, detail: str = ""):
        super().__init__(text)
        self.detail = detail


class Worker:
    """A contender at work in a process of its own; use it in a `with`."""

    def __init__(self, python: str, module: str, task: dict[str, Any], limit: float):
        self.limit = limit
        clean = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.ntk.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=clean,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
        )
        assert self.process.stdin is not None  # both are pipes
        assert self.process.stdout is not None
        self.asked, self.answered = self.process.stdin, self.process.stdout
        try:
            self._ask(task)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def do(self, what: str) -> dict[str, Any]:
        """Ask for one thing and wait for the answer."""
        return self._ask({"do": what})

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.asked, self.answered):
            with contextlib.suppress(OSError):  # what was still to be written has no reader
                pipe.close()

    def _resident(self) -> float:
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self.asked.write(json.dumps(message).encode() + b"\n")
            self.asked.flush()
        except OSError:
            raise self._dead() from None
        stop = time.monotonic() + self.limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.answered, selectors.EVENT_READ)
            while not selector.select(timeout=0.1):
                if self._resident() > KILLED_MB:
                    self.process.kill()
                    raise Failed("out of memory", f"killed above {KILLED_MB} MB")
                if time.monotonic() > stop:
                    self.process.kill()
                    raise Failed(f"over {self.limit:.0f} s")
        line = self.answered.readline()
        if not line:
            raise self._dead()
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"], answer.get("detail", ""))
        return answer

    def _dead(self) -> Failed:
        code = self.process.wait()
        return Failed("out of memory" if code == -9 else "dies", f"exit code {code}")
