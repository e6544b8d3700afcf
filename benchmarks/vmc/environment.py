"""The environment of NetKet: it wants a jax of its own."""

import subprocess
import venv
from pathlib import Path

NETKET = "netket==3.23.0"


def prepare(folder: Path) -> Path:
    """Create it, or find it there; give its Python. Needs Python 3.11 or newer."""
    python = folder.absolute() / "bin" / "python"
    if python.exists():
        shown = subprocess.run([python, "-m", "pip", "show", "-q", "netket"], check=False)
        if shown.returncode == 0:
            return python
    venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", NETKET], check=True)
    return python
