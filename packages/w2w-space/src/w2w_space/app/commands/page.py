"""The command that shows a space on a local page: app."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from diffcore.cli import Flag, Loading
from diffcore.errors import UserError
from diffcore.runtime import Runtime
from w2w_space.app.options import DirectionsPath, SpacePath


def app(
    space: SpacePath,
    model: Annotated[str, Parameter(help="Base model of the space: pipeline folder, safetensors file, or zoo:NAME.")],
    *,
    directions: DirectionsPath | None = None,
    out: Path = Path("runs/app-w2w-space"),
    prompt: str = "a portrait of a person",
    steps: int = 20,
    guidance_scale: float = 4.0,
    size: int | None = None,
    port: int | None = None,
    open: Flag = False,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
) -> int:
    """Show a space on a local page with sliders: pictures before and after, and a button that writes the LoRA.

    Shortest form: w2w-space app SPACE MODEL --directions RUN

    The page is for this machine alone and asks no other server for anything. Needs pip install 'w2w-space[app]'.

    Args:
        directions: Run folder of directions; without them the leading components have sliders.
        out: Folder for the adapters that the page writes.
        prompt: Prompt at first, for models that take prompts.
        steps: Number of solver steps of a picture.
        guidance_scale: Strength of guidance for models that take prompts; 1 is off.
        size: Side of the pictures in pixels; by default what the model was trained for.
        port: Port to listen at; by default the first free one from 7860 on.
        open: Open the page in a browser.
    """
    if steps < 1:
        raise UserError(f"`steps` is {steps}; give at least 1")
    from diffcore.cli import load_model
    from w2w_space.app.page import make_page, serve, wait
    from w2w_space.app.studio import Scene, Studio
    from w2w_space.files.directions import load_directions
    from w2w_space.files.space import base_of_space, load_space

    loaded = load_space(space)
    known = None if directions is None else load_directions(directions, loaded)
    studio = Studio(load_model(model, loading, runtime), loaded, base_of_space(space), known)
    page = make_page(studio, Scene(prompt, steps=steps, guidance_scale=guidance_scale, size=size), out)
    print(f"page: {serve(page, port=port, browser=open)} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    wait(page)
    return 0
