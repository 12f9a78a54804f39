import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcore.errors import CorruptArtifactError, MachineError, RunMismatchError, UserError
from diffcore.io import artifact
from diffcore.io.tables import read_table
from diffcore.run import Run, input_hash
from diffcore.testing.disk import check_every_fault, faulty_disk, result_files

CONFIG = {"seed": 3, "rate": 1e-3, "data": Path("/data/photos"), "name": "a"}


def open_run(folder, **changes):
    options = {"command": "diffcore test", "config": CONFIG, "inputs": {"data": "ab" * 32}, **changes}
    return Run.open(folder, **options)


class Drawing:
    def savefig(self, fname, **options):
        fname.write(b"picture" * 20)


def job(folder: Path) -> None:
    """Two units of work, then the result: the smallest thing that resumes."""
    with open_run(folder) as run:
        if run.finished:
            return
        for key in run.missing(["0", "1"]):
            run.save(key, {"x": torch.arange(4) + int(key)}, loss=0.5 * int(key))
        total = sum(int(run.load(key).tensors["x"].sum()) for key in ("0", "1"))
        run.table("totals", [{"total": total}])
        run.figure("curve", Drawing())
        artifact.save(run.folder / "thing", {"y": torch.tensor([total])}, schema="diffcore/thing@1")
        run.finish({"total": total})


# -- resuming -------------------------------------------------------------------------------------------------


def test_parts_are_skipped_and_keep_their_order(tmp_path):
    with open_run(tmp_path) as run:
        assert run.missing(["b", "a", "c"]) == ["b", "a", "c"]
        run.save("a", {"x": torch.eye(2)}, score=float("nan"), n=2)
    with open_run(tmp_path) as run:
        assert run.missing(["b", "a", "c"]) == ["b", "c"]
        part = run.load("a")
        assert torch.equal(part.tensors["x"], torch.eye(2))
        assert part.fields == {"key": "a", "score": None, "n": 2}
        with pytest.raises(ValueError, match="'b' is given twice"):
            run.missing(["b", "b"])
        with pytest.raises(CorruptArtifactError, match="missing"):
            run.load("b")


def test_status_tells_how_it_ended(tmp_path):
    def status():
        return json.loads((tmp_path / "run.json").read_text())["status"]

    with open_run(tmp_path):
        assert status() == "running"
    assert status() == "interrupted"
    with pytest.raises(ZeroDivisionError), open_run(tmp_path):
        _ = 1 / 0
    assert status() == "failed"
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path):
        raise KeyboardInterrupt
    assert status() == "interrupted"
    with open_run(tmp_path) as run:
        run.finish({"fd": 1.5, "worst": float("inf")})
    assert status() == "finished"
    assert json.loads((tmp_path / "result.json").read_text()) == {"fd": 1.5, "worst": None}


def test_a_finished_run_does_nothing_more(tmp_path):
    job(tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.name != "run.lock"
              and p.is_file()}  # fmt: skip
    job(tmp_path)
    with open_run(tmp_path) as run:
        assert run.finished
        assert run.result == {"total": 16}
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before


def test_other_settings_are_refused_with_a_list(tmp_path):
    with open_run(tmp_path):
        pass
    text = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunMismatchError) as caught:
        open_run(tmp_path, config={**CONFIG, "rate": 0.1, "new": None, "name": "\x1b[31m" + "x" * 100})
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == ["  rate: 0.001 -> 0.1", "  name: a -> \\x1b[31mxxxxxxxxxxxxxxx…"]
    assert "`folder`" in lines[-1]
    with pytest.raises(RunMismatchError, match="command: diffcore test -> diffcore other"):
        open_run(tmp_path, command="diffcore other")
    with pytest.raises(RunMismatchError, match=r"inputs.data: abab"):
        open_run(tmp_path, inputs={"data": "cd" * 32})
    assert (tmp_path / "run.json").read_bytes() == text
    many = {f"option{i}": i for i in range(15)}
    with pytest.raises(RunMismatchError) as caught:
        open_run(tmp_path, config={**CONFIG, **many})
    assert len(str(caught.value).splitlines()) == 13
    assert "and 5 more" in str(caught.value)


def test_settings_that_change_no_result_may_change(tmp_path):
    with open_run(tmp_path, config={**CONFIG, "threads": 1, "batch": 2}, volatile=["batch"]):
        pass
    moved = {
        **CONFIG,
        "config": Path("run/config.yaml"),
        "threads": 2,
        "batch": 4,
        "out": tmp_path,
        "json": True,
        "data": Path("/elsewhere/photos"),
    }
    with open_run(tmp_path, config=moved, volatile=["batch"]):
        pass


def test_restart_keeps_the_old_run(tmp_path):
    folder = tmp_path / "run"
    for _ in range(3):
        with open_run(folder, restart=True, config={**CONFIG, "rate": random.random()}) as run:
            assert run.missing(["a"]) == ["a"]
            run.save("a", {"x": torch.zeros(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
    assert (tmp_path / "run.old-1" / "parts" / "a.json").exists()


def test_keys_of_any_text_become_safe_distinct_names(tmp_path):
    keys = ["a", "A", "ä", "../../etc", "x" * 81, "x" * 82, ".hidden", "", "a b", "a/b", "\ud800", "con", "a\x00b"]
    with open_run(tmp_path) as run:
        for i, key in enumerate(keys):
            run.save(key, {"i": torch.tensor(i)})
        assert run.missing(keys) == []
        assert [int(run.load(key).tensors["i"]) for key in keys] == list(range(len(keys)))
    names = [p.name for p in (tmp_path / "parts").iterdir()]
    assert len(names) == 2 * len(keys)
    assert all(name.isascii() and "/" not in name and len(name) < 100 for name in names)


def test_other_ranks_share_the_folder_without_locking(tmp_path, monkeypatch):
    with open_run(tmp_path) as first:
        monkeypatch.setenv("RANK", "1")
        with open_run(tmp_path) as second:
            second.save("b", {"x": torch.zeros(1)})
            second.finish({"wrong": 1})
        monkeypatch.delenv("RANK")
        assert first.missing(["a", "b"]) == ["a"]
        assert not (tmp_path / "result.json").exists()


# -- the folder -----------------------------------------------------------------------------------------------


def test_folders_that_are_not_ours_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        open_run(file)
    with pytest.raises(UserError, match=r"not of a run \(file\)"):
        open_run(tmp_path)
    assert file.read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_a_users_matter(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        open_run(tmp_path / "run")


def test_newer_record_is_not_touched(tmp_path):
    with open_run(tmp_path):
        pass
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "schema": "diffcore/run@2", "produced_by": "diffcore 9"}))
    with pytest.raises(CorruptArtifactError, match="written by diffcore 9; update"):
        open_run(tmp_path)


def test_second_process_is_told_who_has_it(tmp_path):
    context = multiprocessing.get_context("fork")
    is_open = context.Event()

    def hold():
        with open_run(tmp_path):
            is_open.set()
            signal.pause()  # until it is killed below

    holder = context.Process(target=hold, daemon=True)
    holder.start()
    assert is_open.wait(30)
    with pytest.raises(MachineError, match=f"in use by pid {holder.pid} on {socket.gethostname()} since 2") as caught:
        open_run(tmp_path)
    assert caught.value.exit_code == 3
    holder.kill()
    holder.join()
    with open_run(tmp_path):  # the kernel gave the lock back
        pass


def test_a_fork_does_not_give_the_lock_away(tmp_path):
    with open_run(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=lambda: None)
        child.start()
        child.join()
        with pytest.raises(MachineError, match="in use"):
            open_run(tmp_path)


def test_nothing_personal_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "home" / "somebody"
    config = {"data": Path("/elsewhere/somebody/photos"), "out": place / "run", "seed": 1}
    config |= {"text": "/elsewhere/somebody/weights.bin", "here": tmp_path / "x" / "y.txt", "threads": 2, "skip": None}
    with Run.open(place / "run", command="diffcore test", config=config, inputs={"data": "00"}) as run:
        run.save("a", {"x": torch.zeros(1)})
        run.finish({})
    for path in (place / "run").rglob("*"):
        if path.is_file() and path.name != "run.lock":
            text = path.read_text(errors="replace")
            for word in (str(tmp_path), "somebody", socket.gethostname()):
                assert word not in text, path
    replay = (place / "run" / "config.yaml").read_text()
    assert "here: x/y.txt" in replay
    assert "out:" not in replay
    assert "skip" not in replay


def test_clock_jumps_change_nothing(tmp_path, monkeypatch):
    real = time.time
    for hours in (-1, 87600, 0):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
        job(tmp_path / "jumping")
    monkeypatch.undo()
    job(tmp_path / "steady")
    assert result_files(tmp_path / "jumping") == result_files(tmp_path / "steady")
    assert json.loads((tmp_path / "jumping" / "run.json").read_text())["seconds"] >= 0


# -- tables, inputs -------------------------------------------------------------------------------------------


def test_tables_are_safe_to_open_and_exact_to_read(tmp_path):
    rows = [{"prompt": t, "n": -1.5} for t in ("=1+1", "+x", "-x", "@x", "\tx", "\rx", "'x", "''=", "plain", 'q"\n,')]
    with open_run(tmp_path) as run:
        path = run.table("prompts", rows)
    body = path.read_bytes().decode().partition("\n")[2]
    assert not any(line.startswith(("=", "+", "-", "@", "\t", "\r", '"=', '"\r', '"\t')) for line in body.split("\n"))
    assert [row["prompt"] for row in read_table(path)] == [row["prompt"] for row in rows]
    assert {row["n"] for row in read_table(path)} == {"-1.5"}  # numbers are left alone
    exact = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert exact == rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_comes_back_from_a_table(tmp_path_factory, cells):
    folder = tmp_path_factory.mktemp("t")
    with faulty_disk():  # without waiting for the disk
        run = Run(folder, {"status": "running", "seconds": 0.0}, None)
        path = run.table("t", [{"text": cell, "n": i} for i, cell in enumerate(cells)])
        assert [row["text"] for row in read_table(path)] == cells


def test_tables_without_rows_and_with_gaps(tmp_path):
    with open_run(tmp_path) as run:
        assert read_table(run.table("none", [])) == []
        rows = [{"a": 1}, {"b": np.float32(0.5), "a": float("nan")}, {"b": None}]
        assert read_table(run.table("gaps", rows)) == [
            {"a": "1", "b": ""},
            {"a": "", "b": "0.5"},
            {"a": "", "b": ""},
        ]


def test_input_hash_sees_content_and_names(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"one")
    (folder / "sub" / "b.png").write_bytes(b"x" * 3_000_000)
    hashes = [input_hash(folder), input_hash(folder / "a.png")]
    assert input_hash(folder) == hashes[0]
    (folder / "a.png").write_bytes(b"two")
    hashes += [input_hash(folder), input_hash(folder / "a.png")]
    (folder / "sub" / "b.png").write_bytes(b"x" * 2_999_999 + b"y")  # the end of a large file
    hashes += [input_hash(folder)]
    (folder / "a.png").rename(folder / "c.png")
    hashes += [input_hash(folder)]
    assert len(set(hashes)) == len(hashes)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        input_hash(tmp_path / "none")


# -- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(("fault", "every"), [("full", 2), ("broken", 7), ("read-only", 7)])
def test_any_failing_operation_then_resume_gives_the_same_files(tmp_path, fault, every, lasting):
    assert check_every_fault(job, tmp_path, fault, lasting=lasting, every=every) > 80


@pytest.mark.parametrize("fault", ["killed", "power"])
def test_a_kill_at_any_operation_then_resume_gives_the_same_files(tmp_path, fault):
    assert check_every_fault(job, tmp_path, fault, lasting=True) > 80


def test_stale_temporaries_are_swept(tmp_path, caplog):
    with open_run(tmp_path) as run:
        run.save("a", {"x": torch.zeros(1)})
    stale = tmp_path / "parts" / ".b.safetensors.123.tmp"
    stale.write_bytes(b"half")
    with caplog.at_level(logging.INFO, "diffcore"), open_run(tmp_path):
        assert not stale.exists()
    assert "left by an interrupted write" in caplog.text


def _mutations(count):
    ways = ["flip", "truncate", "delete", "grow", "swap", "empty"]
    return [(ways[i % len(ways)], i) for i in range(count)]


@pytest.mark.parametrize(("way", "seed"), _mutations(40))
def test_damaged_parts_are_dropped_with_a_line_and_made_again(tmp_path, way, seed, caplog):
    rng = random.Random(seed)
    with faulty_disk():
        job(tmp_path)
        golden = result_files(tmp_path)
        victims = sorted(p for p in (tmp_path / "parts").iterdir() if p.suffix in (".json", ".safetensors"))
        victim = rng.choice(victims)
        data = bytearray(victim.read_bytes())
        if way == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif way == "truncate":
            del data[rng.randrange(len(data)) :]
        elif way == "grow":
            data += b" "
        elif way == "empty":
            data.clear()
        elif way == "swap":
            other = rng.choice([p for p in victims if p != victim and p.suffix == victim.suffix])
            data = bytearray(other.read_bytes())
        if way == "delete":
            victim.unlink()
        else:
            victim.write_bytes(data)
        harmless = way == "grow" and victim.suffix == ".json"  # white space after the end of JSON
        with caplog.at_level(logging.WARNING, "diffcore"):
            job(tmp_path)
        assert ("dropped" in caplog.text) is not harmless
        assert result_files(tmp_path) == golden


def test_swapped_pairs_are_noticed(tmp_path, caplog):
    job(tmp_path)
    golden = result_files(tmp_path)
    for suffix in (".json", ".safetensors"):
        first, second = (tmp_path / "parts" / f"{key}{suffix}" for key in "01")
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
    with open_run(tmp_path) as run:
        assert run.missing(["0", "1"]) == ["0", "1"]
    job(tmp_path)
    assert result_files(tmp_path) == golden


def test_files_in_layouts_of_others_are_left_alone(tmp_path):
    job(tmp_path)
    for name in ("model.safetensors", "model.json", "adapter.safetensors", "config.json", "list.json"):
        (tmp_path / name).write_text("[]" if name == "list.json" else "{}")
    job(tmp_path)
    with open_run(tmp_path) as run:
        assert run.finished
    assert {"model.safetensors", "adapter.safetensors", "config.json"} <= {p.name for p in tmp_path.iterdir()}


def test_a_damaged_result_is_made_again(tmp_path):
    job(tmp_path)
    golden = result_files(tmp_path)
    for name in ("result.json", "thing.safetensors"):
        (tmp_path / name).write_bytes(b"{")
        job(tmp_path)
        assert result_files(tmp_path) == golden
