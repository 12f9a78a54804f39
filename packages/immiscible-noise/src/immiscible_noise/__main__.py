"""The console script: hands over to the command line, or says what to install for it."""

import sys
from importlib.util import find_spec

_NEEDED = ("diffcore", "lightning", "diffusers", "matplotlib", "sklearn")


def main() -> int:
    """Runs the command line; without the `train` extra it prints the install line and returns 2."""
    if any(find_spec(name) is None for name in _NEEDED):
        print(
            "immiscible-noise is installed without its command line; the assignment itself works from Python. For "
            "its commands, such as demo, diagnose, train and plan: pip install 'immiscible-noise[train]'",
            file=sys.stderr,
        )
        return 2
    from immiscible_noise.app.cli import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
