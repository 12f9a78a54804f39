"""The local page: a subject, its sliders, the picture before and after, and a button that writes the LoRA.

The page is served to this machine alone, asks no other server for anything, and reports to nobody. All that it does is
in `studio`.
"""

import os
import threading
from pathlib import Path
from typing import Any

from diffcore.errors import MachineError, MissingDependencyError, UserError
from w2w_space.app.studio import Scene, Studio

# Before gradio is imported, which reads them then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    import gradio as gr
except ImportError as error:
    raise MissingDependencyError("the page needs gradio; pip install 'w2w-space[app]'") from error

HOST = "127.0.0.1"
_HOUR = 3600  # seconds, after which pictures that were shown are deleted
_FONTS = ("system-ui", "sans-serif")


def make_page(studio: Studio, scene: Scene, folder: Path) -> gr.Blocks:
    """Returns the page, which `serve` shows.

    Args:
        studio: Space with its model and sliders.
        scene: How pictures are drawn at first.
        folder: Folder for the adapters that are written.
    """
    with gr.Blocks(title="w2w-space", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as page:
        gr.Markdown(f"## {studio.space.num_components} components of {_members(studio)}, drawn by {studio.model.name}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                subject = gr.Dropdown(list(studio.subjects), value=studio.subjects[0], label="subject")
                prompt = gr.Textbox(scene.prompt, label="prompt", visible=studio.takes_prompts)
                last = max(studio.num_classes - 1, 1)
                label = gr.Slider(0, last, scene.label, step=1, label="class", visible=studio.num_classes > 0)
                with gr.Row():
                    seed = gr.Number(scene.seed, label="seed", precision=0, minimum=0)
                    steps = gr.Slider(2, 100, scene.steps, step=1, label="steps")
                sliders = [
                    gr.Slider(-k.reach, k.reach, 0, step=0.1, label=f"{k.name}, sd", info=k.note) for k in studio.knobs
                ]
                names = [knob.name for knob in studio.knobs]
                keep = gr.Dropdown(names, multiselect=True, label="keep as they are (those that are not moved)")
                reset = gr.Button("all sliders to 0")
            with gr.Column(scale=3):
                with gr.Row():
                    before = gr.Image(
                        label="before", type="pil", format="png", interactive=False, buttons=["fullscreen", "download"]
                    )
                    after = gr.Image(
                        label="after", type="pil", format="png", interactive=False, buttons=["fullscreen", "download"]
                    )
                words = gr.Markdown()
                with gr.Row():
                    file = gr.Textbox("edited", label="name of the LoRA", scale=2)
                    write = gr.Button("write the LoRA", variant="primary", scale=1)
                written = gr.Markdown()

        inputs = [subject, prompt, label, seed, steps, keep, *sliders]

        def read(values: tuple[Any, ...]) -> tuple[str, Scene, list[str], dict[str, float]]:
            name, text, digit, start, count, kept, *strengths = values
            shown = Scene(text or "", int(digit or 0), int(start or 0), int(count), scene.guidance_scale, scene.size)
            return name, shown, list(kept or []), dict(zip(names, map(float, strengths), strict=True))

        def draw(*values: Any) -> tuple[Any, Any, str]:
            name, shown, kept, strengths = read(values)
            with _told():
                one, other = studio.pictures(name, strengths, shown, kept)
                return one, other, studio.words(studio.edited(name, strengths, kept))

        def export(title: str, *values: Any) -> str:
            name, _, kept, strengths = read(values)
            with _told():
                done = studio.export(folder, title, name, strengths, kept)
            return f"written: `{done.path}` (largest rounding error {done.error:.1g})"

        shown = [before, after, words]
        page.load(draw, inputs, shown, show_progress="hidden", api_name="draw")
        for control in (subject, label, keep):
            control.input(draw, inputs, shown, show_progress="minimal", api_visibility="private")
        for control in (*sliders, steps):
            control.release(draw, inputs, shown, show_progress="minimal", api_visibility="private")
        for control in (prompt, seed):
            control.submit(draw, inputs, shown, show_progress="minimal", api_visibility="private")
        reset.click(lambda: [0] * len(sliders), None, sliders, api_visibility="private").then(
            draw, inputs, shown, show_progress="minimal", api_visibility="private"
        )
        write.click(export, [file, *inputs], written, api_name="export")
    return page


def serve(page: gr.Blocks, *, port: int | None = None, browser: bool = False) -> str:
    """Shows the page to this machine, and returns its address.

    Args:
        page: Page as `make_page` returns it.
        port: Port to listen at; by default the first free one from 7860 on.
        browser: Whether to open the page in a browser.

    Raises:
        UserError: The port is taken.
    """
    try:
        _, address, _ = page.queue(default_concurrency_limit=1).launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            theme=gr.themes.Base(font=[*_FONTS], font_mono=["monospace"]),
        )
    except OSError as error:
        raise UserError(f"`port` {port} cannot be listened at; leave it out, or give another") from error
    return address


def wait(page: gr.Blocks) -> None:
    """Shows the page until the process is interrupted, and closes it then.

    Args:
        page: Page that `serve` has shown.
    """
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


class _told:
    """Turns errors that name what the user can do into the page's own messages."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError | MachineError | ValueError):
            raise gr.Error(str(error), print_exception=False) from error


def _members(studio: Studio) -> str:
    return f"{len(studio.space.names)} adapters" if studio.space.names else "adapters that are not told"
