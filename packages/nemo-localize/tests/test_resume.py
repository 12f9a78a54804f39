"""Interrupted, resumed, shared between processes: the same file."""

import importlib
import json

import pytest

from diffcore.run import Run, RunMap
from diffcore.testing.distributed import run_forked
from diffcore.testing.waiting import wait_until
from nemo_localize.files.results import write_results
from nemo_localize.first_step import FirstStep
from nemo_localize.localize import localize
from nemo_localize.planted import ordinary_captions
from nemo_localize.settings import SearchSettings, StepSettings

localization = importlib.import_module("nemo_localize.localize")
CAPTIONS = ["portrait of 1917 no 1", *ordinary_captions(3, seed=9), "portrait of 1917 no 2"]


def localized(planted, statistics, folder, fabric=None) -> None:
    step = FirstStep(planted.model, StepSettings(num_seeds=2), batch_size=16)
    with Run.open(folder, command="nemo-localize localize", config={}) as run:
        search = SearchSettings(unit_size=2)
        results = localize(step, CAPTIONS, tau=0.45, statistics=statistics, search=search, map=RunMap(run, fabric))
        if run.leading:
            write_results(folder / "results.jsonl", results)


def lines(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(simple, usual, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    localized(simple, usual, folder)
    return lines(folder)


@pytest.mark.parametrize("interrupted_at", [0, 1, 2])
def test_interrupted_runs_end_in_the_same_file(simple, usual, whole, tmp_path, monkeypatch, interrupted_at):
    count, work = 0, localization.localize_batch

    def stopping(*args, **settings):
        nonlocal count
        count += 1
        if count > interrupted_at:
            raise KeyboardInterrupt
        return work(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(localization, "localize_batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            localized(simple, usual, tmp_path / "run")
    assert not (tmp_path / "run" / "results.jsonl").exists()
    done = sorted((tmp_path / "run" / "parts").glob("*.safetensors"))
    assert len(done) == interrupted_at
    times = [path.stat().st_mtime_ns for path in done]
    localized(simple, usual, tmp_path / "run")
    assert lines(tmp_path / "run") == whole
    assert [path.stat().st_mtime_ns for path in done] == times  # what was finished was not computed again
    assert whole[0]["status"] == "localized"


def test_two_processes_write_the_file_of_one(simple, usual, whole, tmp_path):
    def on_rank(rank: int) -> int:
        from lightning.fabric import Fabric
        from lightning.fabric.plugins.environments import LightningEnvironment

        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[LightningEnvironment()])
        fabric.launch()
        assert (fabric.global_rank, fabric.world_size) == (rank, 2)
        if rank == 0:  # the one that opens the run is late; the other must not write before
            wait_until((tmp_path / "run" / "parts").exists, seconds=1.5)
        localized(simple, usual, tmp_path / "run", fabric)
        return rank

    assert run_forked(on_rank) == [0, 1]
    assert lines(tmp_path / "run") == whole
