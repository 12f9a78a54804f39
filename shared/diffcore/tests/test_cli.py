import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cyclopts import UnknownOptionError

from diffcore.cli import Output, emit, main, make_app, settings, track
from diffcore.cli.app import with_flags
from diffcore.errors import MachineError, UserError
from diffcore.runtime import Runtime

RUNTIME, OUTPUT = Runtime(), Output()
app = make_app("tool", "Does things.\n\n`tool work DATA`", "diffcore")


@app.command
def work(data: Path, *, rate: float = 1e-3, raises: str = "", runtime: Runtime = RUNTIME, output: Output = OUTPUT):
    """Works.

    Args:
        data: Folder of images.
        rate: Learning rate.
        raises: What goes wrong.
    """
    errors = {
        "user": UserError("no \x1b[31m images in DATA\nsecond line"),
        "machine": MachineError("disk is full"),
        "memory": MemoryError("cannot allocate"),
        "torch": torch.OutOfMemoryError("CUDA out of memory.\nTried to"),
        "allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        "disk": OSError(28, "No space left on device"),
        "bug": ValueError("wrong"),
        "interrupt": KeyboardInterrupt(),
        "pipe": BrokenPipeError(),
    }
    if raises:
        raise errors[raises]
    options = settings(data=data, rate=rate, runtime=runtime, output=output)
    emit(options, output.json)
    return 1 if rate > 0.5 else None


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch):
    """What `main` sets for a whole process is put back: environment, logging, signals."""
    for name in ("OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    root, ours = logging.getLogger(), logging.getLogger("diffcore")
    before = root.handlers[:], root.level, ours.level
    monkeypatch.setattr(logging, "captureWarnings", lambda capture: None)
    yield
    root.handlers[:], root.level, ours.level = before


def test_options_reach_the_command(capsys):
    assert main(app, ["work", "folder", "--rate", "0.1", "--seed", "7", "--json", "--threads", "2"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["data"] == "folder"
    assert (found["rate"], found["seed"], found["threads"], found["json"]) == (0.1, 7, 2, True)
    assert err == ""


def test_in_process_use_returns_and_raises():
    assert app(["work", "x", "--rate", "0.6"], result_action="return_value") == 1
    assert app(["work", "x"]) is None
    with pytest.raises(UserError):
        app(["work", "x", "--raises", "user"])
    with pytest.raises(UnknownOptionError):
        app(["work", "x", "--rat", "1"])


@pytest.mark.parametrize(
    ("raises", "code", "words"),
    [
        ("user", 2, ["error: no \\x1b[31m images in DATA\nsecond line"]),
        ("machine", 3, ["error: disk is full"]),
        ("memory", 3, ["out of memory", "--batch-size"]),
        ("torch", 3, ["CUDA out of memory."]),
        ("allocator", 3, ["out of memory"]),
        ("disk", 3, ["No space left", "run the same command again"]),
        ("bug", 70, ["ValueError: wrong", "Traceback", "report it"]),
        ("interrupt", 130, ["interrupted"]),
    ],
)
def test_exit_codes_and_messages(capsys, raises, code, words):
    assert main(app, ["work", "x", "--raises", raises]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words)
    assert ("Traceback" in err) is (raises == "bug")


def test_failed_check_is_exit_code_1():
    assert main(app, ["work", "x", "--rate", "0.6"]) == 1


def test_debug_shows_where_it_came_from(capsys):
    assert main(app, ["work", "x", "--raises", "user", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["work", "x", "--batches", "2"], ["--batches"]),
        (["wrok"], ['Did you mean "work"?']),
        (["work", "x", "--device", "tpu"], ['"tpu"', "cuda"]),
        (["work", "x", "--rate", "fast"], ["fast"]),
        (["work"], ["data"]),
        (["work", "x", "--threads", "0"], ["--threads is 0"]),
        (["work", "x", "--seeed", "0"], ["Did you mean --seed?"]),
    ],
)
def test_bad_command_lines(capsys, tokens, words):
    assert main(app, tokens) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert all(word in err for word in words)


def test_help_shows_groups_and_version_is_the_packages(capsys):
    assert main(app, ["work", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("Folder of images", "Output", "Runtime", "--dry-run", "--restart", "choices: auto, cpu, cuda, mps"):
        assert word in text
    assert main(app, ["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


# -- configuration files --------------------------------------------------------------------------------------


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["work", "x", "--json", "--config", str(path)]


def test_command_line_beats_file_beats_default(tmp_path, capsys):
    assert main(app, [*config(tmp_path, "rate: 0.25\nseed: 4\ndry_run: true\n"), "--seed", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rate"], found["seed"], found["dry_run"], found["device"]) == (0.25, 9, True, "auto")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("rte: 1", "did you mean 'rate'?"),
        ("zzzzzz: 1", "see --help"),
        ("rate: fast", "fast"),
        ("- 1", "holds no options"),
        ("a: [", "not valid YAML"),
        ("rate: 1\nrate: 2", "given twice"),
        (b"\xff\xfe\x00", "not valid YAML"),
        ("rate: !!python/object/apply:os.system ['touch /tmp/executed']", "not valid YAML"),
        ("a: &a [1]\nrate: [" + "*a," * 101 + "]", "aliases"),
        ("[" * 5000, "nested"),
    ],
)
def test_bad_configuration_files(tmp_path, capsys, text, word):
    assert main(app, config(tmp_path, text)) == 2
    err = capsys.readouterr().err
    assert word in err
    assert "config.yaml" in err
    assert "Traceback" not in err
    assert not Path("/tmp/executed").exists()


def test_missing_configuration_file(tmp_path, capsys):
    assert main(app, ["work", "x", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_a_runs_config_replays(tmp_path, capsys, monkeypatch):
    from diffcore.run import Run

    monkeypatch.chdir(tmp_path)
    runtime = Runtime(seed=5, threads=2)
    options = settings(data=Path("x"), rate=0.125, raises="", runtime=runtime, output=Output(out=tmp_path / "run"))
    with Run.open(tmp_path / "run", command="tool work", config=options):
        pass
    assert main(app, ["work", "x", "--json", "--config", "run/config.yaml"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("rate", "seed", "threads", "out")} == {
        "rate": 0.125, "seed": 5, "threads": 2, "out": None,
    }  # fmt: skip


# -- the process ----------------------------------------------------------------------------------------------


def test_environment_is_set_before_the_command():
    main(app, ["work", "x"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_HUB_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "1"


def test_download_is_the_only_way_to_the_network():
    main(app, ["work", "x", "--download"])
    assert "HF_HUB_OFFLINE" not in os.environ


def test_sigterm_is_143_and_with_blocks_end():
    ended = []
    stopping = make_app("stop", "Stops.", "diffcore")

    @stopping.default
    def wait():
        try:
            signal.raise_signal(signal.SIGTERM)
            ended.append("went on")
        finally:
            ended.append("closed")

    before = signal.getsignal(signal.SIGTERM)
    assert main(stopping, []) == 143
    assert ended == ["closed"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_pipe_is_quiet_and_the_command_completes():
    code = (
        "import sys\nfrom diffcore.cli import *\napp = make_app('t', 't', 'diffcore')\n@app.default\ndef go():\n"
        "    sys.stdin.readline()\n    emit({'a': 'x' * 100_000})\n    print('done', file=sys.stderr)\n"
        "assert 'torch' not in sys.modules\nsys.exit(main(app, []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stderr.read() == "done\n"
    assert process.wait(30) == 0
    process.stderr.close()


def test_warnings_and_logs_go_to_standard_error_escaped(capsys):
    noisy = make_app("noisy", "Warns.", "diffcore")

    @noisy.default
    def warn():
        logging.getLogger("diffcore.x").info("dropped \x1b[2J")
        logging.getLogger("other").info("hidden")
        logging.getLogger("other").warning("watch out")

    assert main(noisy, []) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "dropped \\x1b[2J\nwarning: watch out\n")


# -- output ---------------------------------------------------------------------------------------------------


def test_emit_is_one_object_or_aligned_lines(capsys):
    result = {"ratio": 0.51234567, "arms": {"vanilla": 2, "other": float("nan")}, "note": "a\x1bb"}
    emit(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "ratio": 0.51234567, "arms": {"vanilla": 2, "other": None}, "note": "a\x1bb",
    }  # fmt: skip
    emit(result)
    assert capsys.readouterr().out.splitlines() == [
        "ratio         0.5123",
        "arms.vanilla  2",
        "arms.other    None",
        "note          a\\x1bb",
    ]
    emit({"best": ["up", "mid"], "shares": (0.51234567, 1), "skipped": [], "rows": [{"a": 1}]})
    assert capsys.readouterr().out.splitlines() == [
        "best     up, mid",
        "shares   0.5123, 1",
        "skipped  none",
        "rows     [{'a': 1}]",
    ]


def test_sentences_are_printed_whole_and_long_lists_are_not(capsys):
    sentences = "The chain moved all samples. " * 20
    emit({"answer": sentences, "names": ["name"] * 100})
    answer, names = capsys.readouterr().out.splitlines()
    assert answer.endswith(sentences)
    assert names.endswith("…")
    assert len(names) < 220


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("`rate` is 2", "--rate is 2"),
        ("leave out `restart=True`", "leave out --restart"),
        ("give another `folder`", "give another --out"),
        ("`at_step` is 0 and `strict=True`", "at_step is 0 and strict=True"),
        ("`Rate` and ``", "`Rate` and ``"),
    ],
)
def test_messages_name_options_of_the_command_line(message: str, told: str):
    app = make_app("tool", "Does work.", "diffcore")

    @app.command
    def work(*, rate: float = 1.0, output: Output = OUTPUT) -> None:
        """Work."""

    assert with_flags(message, app, ["work", "--rate", "2"]) == told


def test_errors_and_warnings_are_worded_for_the_command_line(capsys: pytest.CaptureFixture[str]):
    app = make_app("tool", "Does work.", "diffcore")

    @app.command
    def work(*, rate: float = 1.0) -> None:
        """Work."""
        logging.getLogger("diffcore").warning("`rate` is odd")
        raise UserError("`rate` is 2; give less")

    assert main(app, ["work", "--rate", "2"]) == 2
    assert capsys.readouterr().err.splitlines() == ["warning: --rate is odd", "error: --rate is 2; give less"]


def test_track_yields_all_and_says_so_every_half_minute(capsys, monkeypatch):
    now = iter(range(0, 10_000, 7))
    monkeypatch.setattr("diffcore.cli.app.time.monotonic", lambda: float(next(now)))
    assert list(track(range(12), "training")) == list(range(12))
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("training: ") and " of 12, " in line for line in lines)
    assert list(track(iter("abc"), "reading")) == ["a", "b", "c"]


def test_track_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(range(3), "training")) == [0, 1, 2]
    assert "training" in sys.stderr.getvalue()


def test_error_panel_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(app, ["work", "x", "--raises", "user"]) == 2
    assert "Error" in sys.stderr.getvalue()
    assert "\\x1b[31m images" in sys.stderr.getvalue()
