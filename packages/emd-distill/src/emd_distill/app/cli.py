"""The console script emd-distill: its commands, by what they are for. Heavy imports stand inside the commands."""

from diffcore.cli import main, make_app
from diffcore.cli.package_commands import add_package_commands

app = make_app(
    "emd-distill",
    "Turn a many-step diffusion teacher into a generator that draws in one step, and keep its modes.\n\n"
    "Start with: emd-distill demo",
    "emd-distill",
)
add_package_commands(app, timed="chains and iterations against a straightforward form in PyTorch")


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)
