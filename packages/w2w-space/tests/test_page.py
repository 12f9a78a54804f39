"""The local page: what it shows and writes is tested without it, and the page in a browser, where there is one."""

import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffcore.adapters import read_adapter
from diffcore.errors import UserError
from diffcore.models import from_pipeline
from diffcore.models.generation import generate
from diffcore.testing import tiny
from diffcore.testing.waiting import wait_until
from w2w_space.app.studio import Scene, Studio
from w2w_space.diagnose import cross_fitted
from w2w_space.directions import Directions, find_directions
from w2w_space.edit import edit
from w2w_space.files.base import base_of_layout
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.space import WeightSpace
from w2w_space.styles import STYLES, load_base, load_styles

FITTED, QUICK = 64, Scene(label=3, steps=4)


@pytest.fixture(scope="module")
def styles() -> tuple[WeightSpace, Directions]:
    population, values = load_styles()
    fitted = population.subset(range(FITTED))
    space, _ = cross_fitted(WeightSpace.build(fitted), num_components=20)
    return space, find_directions(space, Labels(STYLES, values[:FITTED].double()))


@pytest.fixture(scope="module")
def studio(styles: tuple[WeightSpace, Directions]) -> Studio:
    space, directions = styles
    return Studio(load_base(), space, base_of_layout(space.layout), directions)


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image, dtype=float)


def test_pictures_show_the_edit_and_nothing_else(studio: Studio):
    before, same = studio.pictures("style-003", {}, QUICK)
    assert (pixels(before) == pixels(same)).all()
    assert before.size == (384, 384)
    again, brighter = studio.pictures("style-003", {"ink": 2.0}, QUICK)
    _, darker = studio.pictures("style-003", {"ink": -2.0}, QUICK)
    assert (pixels(again) == pixels(before)).all()
    assert pixels(brighter).max() > pixels(before).max() > pixels(darker).max()
    other = studio.pictures("style-003", {}, Scene(label=3, steps=4, seed=1))[0]
    digit = studio.pictures("style-003", {}, Scene(label=7, steps=4))[0]
    assert (pixels(other) != pixels(before)).any()
    assert (pixels(digit) != pixels(before)).any()


def test_sliders_are_the_directions_in_standard_deviations(studio: Studio, styles: tuple[WeightSpace, Directions]):
    space, directions = styles
    assert [knob.name for knob in studio.knobs] == list(STYLES)
    for knob in studio.knobs:
        assert knob.useful[0] < 0 < knob.useful[1] <= knob.reach
        assert f"{directions[knob.name].auc:.2f}" in knob.note
    done = studio.edited("style-005", {"ink": 1.5, "slant": 0.0}, ["ink", "shift"])
    wanted = edit(space.member("style-005"), {"ink": 1.5}, directions, keep=["shift"])
    assert torch.equal(done.point.z, wanted.point.z)
    words = studio.words(done)
    place = next(p for p in done.places if p.name == "ink")
    assert f"| ink | {place.before:+.2f} | {place.after:+.2f} |" in words
    assert "nearest member: style-005" in words
    assert torch.equal(studio.subject("random 1").z, studio.subject("random 1").z)
    assert not torch.equal(studio.subject("random 1").z, studio.subject("random 2").z)
    with pytest.raises(UserError, match="no member 'nobody'"):
        studio.subject("nobody")


def test_the_written_file_is_the_edited_subject(studio: Studio, styles: tuple[WeightSpace, Directions], tmp_path: Path):
    space, directions = styles
    done = studio.export(tmp_path / "new", "../ink <up>.safetensors", "mean", {"ink": 2.0})
    assert done.path == tmp_path / "new" / "ink up.safetensors"
    read = space.project(read_adapter(done.path, base_of_layout(space.layout)))
    assert float(directions["ink"].place(read.z)) == pytest.approx(2.0, abs=0.1)
    assert done.card is not None
    assert "ink: +2 sd" in done.card.read_text()
    with pytest.raises(UserError, match="there already"):
        studio.export(tmp_path / "new", "ink up", "mean", {})
    with pytest.raises(UserError, match="has no name"):
        studio.export(tmp_path, " ../ ", "mean", {})


def prompted() -> Studio:
    """A small text-to-image model with a space of nine members, one of a hostile name, without directions."""
    model = from_pipeline(tiny.pipeline("sd15"))
    shapes = {n: s for n, s in model.adapter_base.shapes["backbone"].items() if n.endswith("to_v")}
    layout, g = Layout.of(shapes, rank=1), torch.Generator().manual_seed(0)
    matrix = 0.3 * torch.randn(9, layout.size, generator=g)
    names = ("<script>", *(f"m{i}" for i in range(8)))
    space = WeightSpace.build(Population(layout, names, Stacked(matrix)), num_components=3)
    return Studio(model, space, model.adapter_base)


def test_prompts_are_taken_where_the_model_takes_them_and_components_where_there_are_no_directions():
    studio = prompted()
    model, space = studio.model, studio.space
    assert [knob.name for knob in studio.knobs] == ["component 1", "component 2", "component 3"]
    assert (studio.takes_prompts, studio.num_classes) == (True, 0)
    one, moved = studio.pictures("m1", {"component 1": 3.0}, Scene("a cat", steps=2))
    other, _ = studio.pictures("m1", {}, Scene("a dog", steps=2))
    assert (pixels(one) != pixels(other)).any()
    assert (pixels(one) != pixels(moved)).any()
    done = studio.edited("mean", {"component 2": 1.0})
    assert torch.allclose(done.point.z, torch.tensor([0.0, 1.0, 0.0]))
    assert "<script>" not in studio.words(studio.edited("<script>", {}))
    with pytest.raises(UserError, match="the model that the space was built for"):
        Studio(load_base(), space, model.adapter_base)
    with pytest.raises(UserError, match="another space"):
        Studio(model, space.truncated(2), model.adapter_base, Directions(space.fingerprint, ()))


@pytest.fixture
def served(studio: Studio, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("gradio")
    from w2w_space.app.page import make_page, serve

    page = make_page(studio, QUICK, tmp_path / "written")
    try:
        yield serve(page), tmp_path / "written"
    finally:
        page.close(verbose=False)


def test_the_page_is_for_this_machine_alone(served: tuple[str, Path]):
    address = served[0]
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    foreign = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^ >]*", text)
    assert [tag for tag in foreign if address.rstrip("/") not in tag] == []
    with urllib.request.urlopen(address + "config") as answer:
        config = json.loads(answer.read())
    labels = [part["props"].get("label") for part in config["components"]]
    assert [name for name in labels if name and name.endswith(", sd")] == [f"{style}, sd" for style in STYLES]
    assert config["analytics_enabled"] is False
    assert config["stylesheets"] == []  # fonts of other servers
    port = int(address.rstrip("/").rpartition(":")[2])
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((own, port), timeout=5)


def function(page: Any, name: str) -> Any:
    """Returns the function that a button or control of the page calls."""
    return next(each.fn for each in page.fns.values() if each.api_name == name)


def test_the_page_asks_for_what_its_controls_say(studio: Studio, tmp_path: Path):
    gradio = pytest.importorskip("gradio")
    from w2w_space.app.page import make_page

    page = make_page(studio, QUICK, tmp_path)
    draw, export = function(page, "draw"), function(page, "export")
    moved = dict.fromkeys(STYLES, 0.0) | {"ink": 2.0, "slant": -1.0}
    one, other, words = draw("style-003", "", 3, 1, 4, ["shift"], *moved.values())
    before, after = studio.pictures("style-003", moved, Scene(label=3, steps=4, seed=1), ["shift"])
    assert (pixels(one) == pixels(before)).all()
    assert (pixels(other) == pixels(after)).all()
    assert words == studio.words(studio.edited("style-003", moved, ["shift"]))
    free = draw("style-003", "", 3, 1, 4, None, *moved.values())
    assert free[2] == studio.words(studio.edited("style-003", moved))
    assert free[2] != words
    empty = draw("mean", None, None, None, 4, None, *[0.0] * 5)
    assert (pixels(empty[0]) == pixels(studio.pictures("mean", {}, Scene(steps=4))[0])).all()
    told = export("my edit", "style-003", "", 3, 1, 4, ["shift"], *moved.values())
    assert str(tmp_path / "my edit.safetensors") in told
    read = studio.space.project(read_adapter(tmp_path / "my edit.safetensors", base_of_layout(studio.space.layout)))
    assert (read.z - studio.edited("style-003", moved, ["shift"]).point.z).abs().max() < 0.2
    with pytest.raises(gradio.Error, match="there already"):
        export("my edit", "style-003", "", 3, 1, 4, [], *moved.values())
    with pytest.raises(gradio.Error, match="no member 'nobody'"):
        draw("nobody", "", 3, 1, 4, [], *moved.values())
    resets = [each.fn() for each in page.fns.values() if each.fn is not None and not each.inputs]
    assert [0] * 5 in resets


def test_prompts_reach_the_model_from_the_page(tmp_path: Path):
    pytest.importorskip("gradio")
    from w2w_space.app.page import make_page

    studio, scene = prompted(), Scene("a cat", steps=2, guidance_scale=4.0, size=40)
    draw = function(make_page(studio, scene, tmp_path), "draw")
    drawn = draw("m1", "a dog", None, 0, 2, [], 0.0, 0.0, 0.0)[0]
    wanted = studio.pictures("m1", {}, Scene("a dog", steps=2, guidance_scale=4.0, size=40))[0]
    assert (pixels(drawn) == pixels(wanted)).all()
    assert drawn.size == (360, 360)  # nine times forty pixels
    plain = studio.pictures("m1", {}, Scene("a dog", steps=2, guidance_scale=1.0, size=40))[0]
    assert (pixels(plain) != pixels(wanted)).any()


def test_what_pixel_models_predict_is_bounded(studio: Studio, monkeypatch: pytest.MonkeyPatch):
    asked = list[float | None]()

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        asked.append(options["clip_x0"])
        return generate(*args, **options)

    monkeypatch.setattr("w2w_space.app.studio.generate", noted)
    studio.pictures("mean", {}, Scene(label=9, steps=2, seed=77))
    prompted().pictures("mean", {}, Scene("a cat", steps=2))
    assert set(asked) == {1.2, None}
    assert asked[0] == 1.2


def test_sliders_reach_as_far_as_members_do(styles: tuple[WeightSpace, Directions], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("w2w_space.app.studio.useful_places", lambda row, space: (-4.2, 1.0))
    space, directions = styles
    studio = Studio(load_base(), space, base_of_layout(space.layout), directions)
    assert {knob.reach for knob in studio.knobs} == {5}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.slow
def test_a_slider_is_moved_and_the_lora_written_in_a_browser(served: tuple[str, Path], tmp_path: Path):
    address, folder = served
    with Browser(tmp_path / "profile") as browser:
        browser.go(address)
        browser.wait_for("[...document.querySelectorAll('img')].filter(i => i.src.includes('file=')).length == 2")
        browser.wait_for("[...document.querySelectorAll('img')].every(i => i.naturalWidth == 384)")
        first = browser.run("[...document.querySelectorAll('img')].map(i => i.src)")
        browser.run(
            """(() => {
              const slider = document.querySelector("input[aria-label='range slider for ink, sd']");
              Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(slider, '2');
              for (const kind of ['input', 'change', 'pointerup', 'mouseup'])
                slider.dispatchEvent(new Event(kind, {bubbles: true}));
            })()"""
        )
        browser.wait_for("document.body.innerText.includes('+2.00')")
        browser.wait_for(f"[...document.querySelectorAll('img')].map(i => i.src)[1] != {json.dumps(first[1])}")
        browser.run("[...document.querySelectorAll('button')].find(b => b.innerText == 'write the LoRA').click()")
        browser.wait_for("document.body.innerText.includes('written:')")
        assert {url.split("/")[2] for url in browser.requests if "//" in url} == {address.split("/")[2]}
    assert (folder / "edited.safetensors").is_file()


class Browser:
    """Chromium without a window, driven over its debugging protocol: a WebSocket of JSON messages."""

    def __init__(self, profile: Path) -> None:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1300,1100"]
        self._process = subprocess.Popen(
            ["chromium", *words, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        told = next(line for line in self._process.stderr if "DevTools listening on" in line)
        port = int(told.split(":")[2].split("/")[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(tab for tab in json.loads(answer.read()) if tab["type"] == "page")
        self._socket = socket.create_connection(("127.0.0.1", port))
        key = base64.b64encode(os.urandom(16)).decode()
        place = tab["webSocketDebuggerUrl"].partition(str(port))[2]
        lines = [f"GET {place} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        self._file = self._socket.makefile("rb")
        while self._file.readline().strip():
            pass
        self._sent, self.requests = 0, list[str]()
        self._do("Page.enable")
        self._do("Network.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()

    def go(self, address: str) -> None:
        self._do("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        answer = self._do("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        if not wait_until(lambda: bool(self.run(script)), seconds=120.0):
            raise TimeoutError(f"{script}: {self.run('document.body.innerText')}")

    def _do(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        body = json.dumps({"id": self._sent, "method": method, "params": params}).encode()
        mask, size = os.urandom(4), len(body)
        head = struct.pack("!BB", 0x81, 0x80 | size) if size < 126 else struct.pack("!BBH", 0x81, 0xFE, size)
        self._socket.sendall(head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(body)))
        while True:
            message = self._message()
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self._sent:
                return message["result"]

    def _message(self) -> dict[str, Any]:
        data, last = b"", False
        while not last:
            first, size = self._file.read(2)
            last = bool(first & 0x80)
            if size == 126:
                size = struct.unpack("!H", self._file.read(2))[0]
            elif size == 127:
                size = struct.unpack("!Q", self._file.read(8))[0]
            data += self._file.read(size)
        return json.loads(data)


@pytest.mark.slow
def test_the_command_ends_when_it_is_told_to(tmp_path: Path, styles: tuple[WeightSpace, Directions]):
    """From the command line to an answering page, and to a clean end."""
    pytest.importorskip("gradio")
    from w2w_space.files.space import save_space

    save_space(styles[0], tmp_path / "space.safetensors")
    words = [sys.executable, "-c", "from w2w_space.app.cli import run; raise SystemExit(run())", "app"]
    process = subprocess.Popen(
        [*words, str(tmp_path / "space.safetensors"), "zoo:digits-styles", "--steps", "2"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if line.startswith("page: "))
        with urllib.request.urlopen(line.split()[1]) as answer:
            assert b"w2w-space" in answer.read()
    finally:
        process.terminate()
    assert process.wait(120) == 143
    assert "Traceback" not in process.stderr.read()
