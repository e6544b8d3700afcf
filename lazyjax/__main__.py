"""`python -m lazyjax COMMAND`: see `python -m lazyjax --help`."""

import signal
import sys
from typing import Any

import tyro

from lazyjax import checks
from lazyjax.commands import COMMANDS

_USAGE = """usage: python -m lazyjax COMMAND MODULE:FACTORY --data FILE --out PATH [options]

compare  Does this network train like its linearization? Train it and its tangent model, and
         write a page that says so: --data d.npz --out page/
kernel   Compute the empirical neural tangent kernel of a model and write it to the disk, tile by
         tile: --data x.npz --out K.zarr

MODULE:FACTORY names a function of a module in this folder that gives (f, params).
`python -m lazyjax COMMAND --help` shows the options."""


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    signal.signal(signal.SIGTERM, _stop)
    try:
        checks.one_of("command", words[0], COMMANDS)
        tyro.cli(COMMANDS[words[0]], prog=f"python -m lazyjax {words[0]}", args=words[1:])
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as told:  # help, or a flag that tyro has refused
        return int(told.code or 0)
    except KeyboardInterrupt:
        print("Interrupted. The same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
