"""The environment of neural-tangents: the last jax it imports with, and nothing newer."""

import subprocess
import venv
from pathlib import Path

OLD = ("jax==0.4.23", "jaxlib==0.4.23", "numpy<2", "scipy<1.13", "absl-py", "frozendict")
ALONE = ("neural-tangents==0.6.5", "tf2jax")  # without what they ask for, tensorflow among it


def prepare(folder: Path) -> None:
    """Create it, or find it there. Needs Python 3.9 to 3.12, for the old jaxlib."""
    python = folder / "bin" / "python"
    if python.exists():
        shown = subprocess.run([python, "-m", "pip", "show", "-q", "neural-tangents"], check=False)
        if shown.returncode == 0:
            return
    venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, *OLD], check=True)
    subprocess.run([*install, "--no-deps", *ALONE], check=True)
