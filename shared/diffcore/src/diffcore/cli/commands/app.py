"""The console script `diffcore`: its commands in one app. Heavy imports stand inside the commands."""

from diffcore.cli.app import main, make_app
from diffcore.cli.commands.adapters import adapter_app
from diffcore.cli.commands.hooks import hooks
from diffcore.cli.commands.info import info
from diffcore.cli.commands.metrics import metrics
from diffcore.cli.commands.sample import sample
from diffcore.cli.commands.zoo import zoo_app

app = make_app(
    "diffcore",
    "Look at diffusion models on disk and into them, and sample, without running anything from their folders.\n\n"
    "Start with: diffcore info FOLDER",
    "diffcore",
)
for command in (adapter_app, zoo_app, info, hooks, sample, metrics):
    app.command(command)


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)
