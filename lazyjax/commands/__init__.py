"""The commands of `python -m lazyjax`."""

from lazyjax.commands.compare import compare
from lazyjax.commands.kernel import kernel

COMMANDS = {"compare": compare, "kernel": kernel}

__all__ = ["COMMANDS", "compare", "kernel"]
