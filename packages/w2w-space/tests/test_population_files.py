"""Populations on disk: many kinds of files read into one layout, bad files named, nothing lost when a run is killed."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffcore.adapters import Adapter, Base, LowRank, write_adapter
from diffcore.adapters.keys import BACKBONE
from diffcore.errors import CorruptArtifactError, IncompatibleModelError, MachineError, UserError
from diffcore.io import artifact, files
from w2w_space.files import population as stored
from w2w_space.files.importing import adapter_paths, add, import_adapters, plan_import
from w2w_space.files.population import Member, PopulationFolder
from w2w_space.layout import Layout
from w2w_space.population import Vectors
from w2w_space.products import product_gram
from w2w_space.space import WeightSpace

SHAPES = {"mid.attn1.to_q": (6, 5), "mid.attn1.to_v": (6, 5), "mid.attn2.to_q": (6, 4), "mid.conv": (5, 3, 3, 3)}
BASE = Base("tiny", "unet", {BACKBONE: SHAPES, "text_encoder": {"layers.0.q_proj": (4, 4)}})
LINEAR = [name for name in SHAPES if name != "mid.conv"]


def drawn(seed: int, rank: int = 2, modules: list[str] | None = None, alpha: float | None = None) -> Adapter:
    g = torch.Generator().manual_seed(seed)

    def change(name: str) -> LowRank:
        outputs, *inputs = SHAPES[name]
        down, up = torch.randn(rank, *inputs, generator=g), torch.randn(outputs, rank, generator=g)
        return LowRank(down, up, float(alpha or rank))

    return Adapter({name: change(name) for name in modules or LINEAR}, name=f"a{seed}")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def one(adapter: Adapter, name: str, format: str = "diffusers") -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        return write_adapter(adapter, tmp_path / name, format=format, overwrite=True)  # type: ignore[arg-type]

    return one


def products(adapter: Adapter, layout: Layout) -> dict[str, torch.Tensor]:
    return {name: adapter.modules[name].delta(torch.float64) for name in layout.modules}


def test_files_of_all_layouts_give_the_changes_that_they_stand_for(write, tmp_path: Path):
    adapters = [drawn(0), drawn(1), drawn(2)]
    paths = [
        write(adapters[0], "one.safetensors"),
        write(adapters[1], "two.safetensors", "kohya"),
        write(adapters[2], "three", "peft"),
    ]
    found = import_adapters(tmp_path / "pop", paths, BASE)
    assert found.names == ("one", "two", "three")
    assert isinstance(found, Vectors)
    population = PopulationFolder.open(tmp_path / "pop").population()
    for row, adapter in zip(population.vectors.rows([0, 1, 2]), adapters, strict=True):
        read = products(population.layout.adapter(row), population.layout)
        for name, product in products(adapter, population.layout).items():
            assert torch.allclose(read[name], product, atol=1e-6)


def test_strengths_are_folded_into_the_vectors(tmp_path: Path):
    adapter = drawn(0, rank=1, alpha=27.0)
    tensors = {}
    for name, change in adapter.modules.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": change.down, f"{stem}.lora_up.weight": change.up}
        tensors[f"{stem}.alpha"] = torch.tensor(27.0)
    save_file(tensors, tmp_path / "a.safetensors")
    found = import_adapters(tmp_path / "pop", [tmp_path / "a.safetensors"], BASE)
    read = products(found.layout.adapter(found.rows([0])[0]), found.layout)
    change = adapter.modules[LINEAR[0]]
    assert torch.allclose(read[LINEAR[0]], 27 * (change.up @ change.down).double(), atol=1e-5)


def test_columns_and_rows_are_those_of_one_matrix_over_several_shards(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 4)
    layout, matrix = Layout.of({"a": (3, 2), "b": (2, 2)}, rank=1), torch.randn(11, 9)
    folder = PopulationFolder.create(tmp_path / "pop", layout, BASE)
    for start, stop in ((0, 3), (3, 5), (5, 11)):
        folder = folder.append(matrix[start:stop], [Member(f"m{i}") for i in range(start, stop)])
    folder = PopulationFolder.open(tmp_path / "pop")
    assert folder.names == tuple(f"m{i}" for i in range(11))
    assert torch.equal(folder.columns(slice(2, 7)), matrix[:, 2:7])
    assert torch.equal(folder.rows([10, 0, 4]), matrix[[10, 0, 4]])
    assert all(len(rows) <= 4 for _, rows in folder.shards.values())
    in_use = sorted(path.name for path in (tmp_path / "pop" / "shards").glob("*.safetensors"))
    assert in_use == sorted(folder.shard(number).name for number in folder.shards)
    space, other = WeightSpace.build(folder.population()), WeightSpace.build(folder.population().subset(range(11)))
    assert torch.equal(space.components, other.components)


def test_a_read_piece_is_no_view_of_the_file(tmp_path: Path):
    layout, matrix = Layout.of({"a": (3, 2)}, rank=1), torch.randn(4, 5)
    folder = PopulationFolder.create(tmp_path / "pop", layout, BASE).append(matrix, [Member(n) for n in "abcd"])
    folder.columns(slice(0, 3)).zero_()
    folder.rows([1]).zero_()
    assert torch.equal(folder.columns(slice(0, 5)), matrix)
    assert folder.columns(slice(0, 3)).is_contiguous()


def test_bad_files_are_named_and_cost_nothing(write, tmp_path: Path):
    good = [write(drawn(seed), f"good{seed}.safetensors") for seed in range(3)]
    (tmp_path / "noise.safetensors").write_bytes(b"no tensors")
    nan = drawn(5)
    nan.modules[LINEAR[0]].down[0, 0] = float("nan")
    other = Base("other", "unet", {BACKBONE: {"mid.attn1.to_q": (8, 5)}})
    foreign = Adapter({"mid.attn1.to_q": LowRank(torch.randn(2, 5), torch.randn(8, 2), 2.0)})
    text = Adapter({}, {"text_encoder": {"layers.0.q_proj": LowRank(torch.randn(2, 4), torch.randn(4, 2), 2.0)}})
    zero = drawn(6)
    for change in zero.modules.values():
        change.up.zero_()
    bad = {
        "noise": tmp_path / "noise.safetensors",
        "not finite": write(nan, "nan.safetensors"),
        "made for": write(foreign, "foreign.safetensors"),
        "text encoders alone": write(text, "text.safetensors"),
        "changes nothing": write(zero, "zero.safetensors"),
        "No such file": tmp_path / "missing.safetensors",
    }
    assert other.shapes != BASE.shapes
    found = import_adapters(tmp_path / "pop", [*bad.values(), *good], BASE)
    assert found.names == ("good0", "good1", "good2")
    reasons = {Path(line.source).stem: line.reason for line in found.skipped}
    assert set(reasons) == {path.stem for path in bad.values()}
    for word, path in bad.items():
        assert path.stem in reasons[path.stem]
        assert word == "noise" or word in reasons[path.stem], reasons[path.stem]
    with pytest.raises(UserError, match="no file to be left out"):
        add(found, [bad["changes nothing"]], strict=True)
    with pytest.raises(UserError, match=r"none of 2 files is an adapter of tiny; the first: .*noise"):
        import_adapters(tmp_path / "none", [bad["noise"], bad["text encoders alone"]], BASE)
    with pytest.raises(UserError, match=r"^[^;]*noise.safetensors is not a safetensors file"):
        import_adapters(tmp_path / "none", [bad["noise"]], BASE)
    with pytest.raises(UserError, match="there are no files"):
        import_adapters(tmp_path / "none", [], BASE)


def test_the_same_adapter_in_another_gauge_is_a_duplicate(write, tmp_path: Path):
    one = drawn(0)
    turn = torch.tensor([[1.0, 2.0], [-0.5, 3.0]])
    turned = {n: LowRank(turn @ c.down, c.up @ turn.inverse(), c.alpha) for n, c in one.modules.items()}
    near = {n: LowRank(c.down, c.up * 1.01, c.alpha) for n, c in one.modules.items()}
    paths = [
        write(one, "one.safetensors"),
        write(Adapter(turned), "turned.safetensors", "kohya"),
        write(Adapter(near), "near.safetensors"),
    ]
    found = import_adapters(tmp_path / "pop", paths, BASE)
    assert found.names == ("one", "near")
    assert "turned.safetensors is the same adapter as 'one'" in found.skipped[0].reason
    assert add(found, [paths[1]]).names == ("one", "near")
    # Members that were trained here came without a sketch, and are compared all the same.
    trained = PopulationFolder.create(tmp_path / "trained", found.layout, BASE)
    trained = trained.append(found.rows([0]), [Member("trained")])
    assert "the same adapter as 'trained'" in add(trained, [paths[1]]).skipped[0].reason


def test_equal_stems_get_names_of_their_own(write, tmp_path: Path):
    places = ["x/lora.safetensors", "y/lora.safetensors", "anna/pytorch_lora_weights.safetensors"]
    paths = [write(drawn(seed), place) for seed, place in enumerate(places)]
    write(drawn(7), "bob", "peft")
    assert adapter_paths(tmp_path) == sorted([*paths, tmp_path / "bob"])
    paths[0].with_suffix(".json").write_text("{}")  # notes of another tool
    artifact.save(tmp_path / "point.safetensors", {"coefficients": torch.zeros(2)}, schema="w2w-space/point@1")
    (tmp_path / "run" / "parts").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    save_file({"x": torch.zeros(2)}, tmp_path / "run" / "parts" / "a.safetensors")
    import_adapters(tmp_path / "other", paths[:1], BASE)
    assert adapter_paths(tmp_path) == sorted([*paths, tmp_path / "bob"])
    found = import_adapters(tmp_path / "pop", [*paths, tmp_path / "bob"], BASE)
    assert found.names == ("lora", "y/lora", "anna", "bob")


def test_ranks_and_modules_are_brought_to_one_layout(write, tmp_path: Path):
    paths = [
        write(drawn(0, rank=2), "a.safetensors"),
        write(drawn(1, rank=2), "b.safetensors"),
        write(drawn(2, rank=3, modules=LINEAR[:2]), "c.safetensors"),
        write(drawn(3, rank=1, modules=[*LINEAR[:2], "mid.conv"]), "d.safetensors"),
    ]
    plan = plan_import(paths, BASE)
    assert (plan.layout.rank, plan.layout.modules, plan.convolutions) == (2, tuple(LINEAR[:2]), 1)
    found = import_adapters(tmp_path / "pop", paths, BASE, largest_loss=0.9)
    losses = {member.name: (member.loss, member.dropped) for member in found.members}
    assert losses["a"][0] == losses["d"][0] == 0
    assert 0 < losses["c"][0] < 0.9
    whole = drawn(0).modules
    kept = sum(float(whole[name].delta().square().sum()) for name in LINEAR[:2])
    assert losses["a"][1] == pytest.approx(1 - kept / sum(float(c.delta().square().sum()) for c in whole.values()))
    cut = import_adapters(tmp_path / "cut", paths, BASE, rank=1, largest_loss=0.05)
    assert cut.names == ("d",)
    assert "larger `rank`" in cut.skipped[0].reason
    union = import_adapters(tmp_path / "union", paths, BASE, modules="union", convolutions=True, largest_loss=0.9)
    assert set(union.layout.modules) == set(SHAPES)
    assert len(union) == 4
    row = union.layout.adapter(union.rows([2])[0]).modules["mid.attn2.to_q"]
    assert not bool(row.delta().any())
    apart = [write(drawn(8, modules=LINEAR[:1]), "e.safetensors"), write(drawn(9, modules=LINEAR[1:]), "f.safetensors")]
    with pytest.raises(IncompatibleModelError, match="pass `modules`='union'"):
        plan_import(apart, BASE)


def test_half_precision_is_refused_where_it_does_not_hold(write, tmp_path: Path):
    big = drawn(1)
    big.modules[LINEAR[0]].up.mul_(1e6)
    paths = [write(drawn(0), "a.safetensors"), write(big, "b.safetensors")]
    found = import_adapters(tmp_path / "pop", paths, BASE, dtype="float16")
    assert found.names == ("a",)
    assert "float16" in found.skipped[0].reason
    assert found.rows([0]).dtype == torch.float32


def test_members_are_removed_from_the_disk(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 3)
    layout, matrix = Layout.of({"a": (3, 2)}, rank=1), torch.randn(7, 5)
    folder = PopulationFolder.create(tmp_path / "pop", layout, BASE)
    folder = folder.append(matrix, [Member(f"m{i}") for i in range(7)])
    left = folder.remove(["m1", "m6"])
    opened = PopulationFolder.open(tmp_path / "pop")
    assert opened.names == left.names == ("m0", "m2", "m3", "m4", "m5")
    assert torch.equal(opened.rows(range(5)), matrix[[0, 2, 3, 4, 5]])
    gone = matrix[1].numpy().tobytes()
    assert all(gone not in path.read_bytes() for path in (tmp_path / "pop" / "shards").iterdir())
    more = opened.append(matrix[[6]], [Member("m6")])
    assert more.names == ("m0", "m2", "m3", "m4", "m5", "m6")
    assert torch.equal(PopulationFolder.open(tmp_path / "pop").rows(range(6)), matrix[[0, 2, 3, 4, 5, 6]])
    with pytest.raises(UserError, match="no member 'm1'"):
        more.remove(["m1"])
    with pytest.raises(UserError, match="a member 'm6' already"):
        more.append(matrix[[6]], [Member("m6")])


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_old_population(tmp_path: Path, monkeypatch, failing: int):
    layout, matrix = Layout.of({"a": (3, 2)}, rank=1), torch.randn(5, 5)
    folder = PopulationFolder.create(tmp_path / "pop", layout, BASE).append(matrix[:3], [Member(n) for n in "abc"])
    real, calls = files.write, iter(range(100))

    def full(descriptor: int, data: bytes) -> None:
        if next(calls) == failing:
            raise OSError(28, "no space")
        real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        if failing < 3:
            with pytest.raises(MachineError):
                folder.append(matrix[3:], [Member("d"), Member("e")])
        else:
            folder.append(matrix[3:], [Member("d"), Member("e")])
    opened = PopulationFolder.open(tmp_path / "pop")
    assert len(opened) == (3 if failing < 3 else 5)
    assert opened.verify() == []
    if failing < 3:
        opened = opened.append(matrix[3:], [Member("d"), Member("e")])
    assert torch.equal(PopulationFolder.open(tmp_path / "pop").rows(range(5)), matrix)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_full_disk_keeps_members_that_were_to_be_removed(tmp_path: Path, monkeypatch, failing: int):
    monkeypatch.setattr(stored, "SHARD_ROWS", 3)
    layout, matrix = Layout.of({"a": (3, 2)}, rank=1), torch.randn(5, 5)
    folder = PopulationFolder.create(tmp_path / "pop", layout, BASE).append(matrix, [Member(n) for n in "abcde"])
    real, calls = files.write, iter(range(100))

    def full(descriptor: int, data: bytes) -> None:
        if next(calls) == failing:
            raise OSError(28, "no space")
        real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(MachineError):
            folder.remove(["a", "d"])
    opened = PopulationFolder.open(tmp_path / "pop")
    assert opened.verify() == []
    assert torch.equal(opened.rows(range(5)), matrix)
    assert opened.remove(["a", "d"]).names == ("b", "c", "e")


def test_an_import_goes_on_where_it_stopped(write, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("w2w_space.files.importing.SHARD_ROWS", 2)
    paths = [write(drawn(seed), f"{seed}.safetensors") for seed in range(5)]

    def stop(paths: Sequence[Path]) -> Iterator[Path]:
        yield from paths[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_adapters(tmp_path / "pop", paths, BASE, track=stop)
    assert len(PopulationFolder.open(tmp_path / "pop")) == 3  # with what was read and filled no shard
    resumed = import_adapters(tmp_path / "pop", paths, BASE)
    whole = import_adapters(tmp_path / "whole", paths, BASE)
    assert resumed.names == whole.names
    assert torch.equal(resumed.rows(range(5)), whole.rows(range(5)))
    assert [(m.name, m.sketch, m.sha256) for m in resumed.members] == [
        (m.name, m.sketch, m.sha256) for m in whole.members
    ]
    with pytest.raises(UserError, match="other settings"):
        import_adapters(tmp_path / "pop", paths, BASE, rank=1)


def test_damage_is_found(write, tmp_path: Path):
    paths = [write(drawn(seed), f"{seed}.safetensors") for seed in range(3)]
    found = import_adapters(tmp_path / "pop", paths, BASE)
    assert found.verify() == []
    shard = found.shard(next(iter(found.shards)))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert "does not match the sum" in PopulationFolder.open(tmp_path / "pop").verify()[0]
    shard.write_bytes(bytes(data[:-4]))
    with pytest.raises(CorruptArtifactError, match="bytes"):
        PopulationFolder.open(tmp_path / "pop")
    lines = (tmp_path / "pop/members.jsonl").read_text()
    (tmp_path / "pop/members.jsonl").write_text(lines + '{"state": "mem')
    with pytest.raises(CorruptArtifactError, match="damaged in line 4"):
        PopulationFolder.open(tmp_path / "pop")
    with pytest.raises(UserError, match="holds no population"):
        PopulationFolder.open(tmp_path)


def test_the_reader_tells_what_it_took_for_granted(tmp_path: Path):
    change = drawn(0).modules[LINEAR[0]]
    name = f"unet.{LINEAR[0]}"
    save_file({f"{name}.lora_A.weight": change.down, f"{name}.lora_B.weight": change.up}, tmp_path / "a.safetensors")
    found = import_adapters(tmp_path / "pop", [tmp_path / "a.safetensors"], BASE)
    line = json.loads((tmp_path / "pop/members.jsonl").read_text())
    assert "does not say the alpha" in line["notes"][0]
    assert line["state"] == "member"
    assert (line["shard"], line["row"], line["rank"]) == (0, 0, 2)
    assert len(found.members[0].sha256) == 64
    assert float(product_gram(found.layout, found.rows([0]))) == pytest.approx(
        float(change.delta(torch.float64).square().sum()), rel=1e-6
    )


def test_links_and_names_of_any_script_are_read(write, tmp_path: Path):
    path = write(drawn(0), "Žofie 花子.safetensors")
    (tmp_path / "link.safetensors").symlink_to(write(drawn(1), "target.safetensors"))
    found = import_adapters(tmp_path / "pop", [path, tmp_path / "link.safetensors"], BASE)
    assert PopulationFolder.open(tmp_path / "pop").names == found.names == ("Žofie 花子", "link")
    assert len(add(found, [path])) == 2
    assert not add(found, [path]).skipped


def test_a_changed_file_takes_the_place_of_its_member(write, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    paths = [write(drawn(seed), f"{name}.safetensors") for seed, name in enumerate("abc")]
    import_adapters(tmp_path / "pop", paths, BASE)
    write(drawn(7), "b.safetensors")
    paths.append(write(drawn(1), "d.safetensors"))  # what b was is no duplicate any more
    found = import_adapters(tmp_path / "pop", paths, BASE)
    assert sorted(found.names) == ["a", "b", "c", "d"]
    found = found.remove(["d"])
    paths.pop()
    assert "replaced" in caplog.text
    assert "'b'" in caplog.text
    row = found.rows([found.names.index("b")])[0]
    read = products(found.layout.adapter(row), found.layout)
    for name, product in products(drawn(7), found.layout).items():
        assert torch.allclose(read[name], product, atol=1e-5)
    assert PopulationFolder.open(tmp_path / "pop").verify() == []
    # Once more nothing is to be done, and a file that was only written again is the same member still.
    caplog.clear()
    assert import_adapters(tmp_path / "pop", paths, BASE).names == found.names
    assert "replaced" not in caplog.text
    write(drawn(7), "b.safetensors", "kohya")
    again = import_adapters(tmp_path / "pop", paths, BASE)
    assert (sorted(again.names), again.skipped) == (["a", "b", "c"], ())
    # The old member stays where the new file cannot be one.
    paths[0].write_bytes(b"damaged")
    kept = import_adapters(tmp_path / "pop", paths, BASE)
    assert sorted(kept.names) == ["a", "b", "c"]
    assert [Path(line.source).name for line in kept.skipped] == ["a.safetensors"]
    # And a copy of another member is no new content.
    write(drawn(2), "a.safetensors")
    assert "is the same adapter as 'c'" in import_adapters(tmp_path / "pop", paths, BASE).skipped[0].reason


def test_another_alpha_in_the_configuration_is_another_adapter(write, tmp_path: Path):
    folder = write(drawn(0), "lora", "peft")
    before = import_adapters(tmp_path / "pop", [folder], BASE).rows([0])[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))
    found = import_adapters(tmp_path / "pop", [folder], BASE)
    one, other = (products(found.layout.adapter(row), found.layout) for row in (before, found.rows([0])[0]))
    assert all(torch.allclose(3 * change, other[name], atol=1e-5) for name, change in one.items())


def test_an_error_in_the_middle_keeps_what_was_read(write, tmp_path: Path):
    paths = [write(drawn(seed), f"{seed}.safetensors") for seed in range(3)]
    import_adapters(tmp_path / "pop", paths[:1], BASE)
    paths[2].write_bytes(b"damaged")
    with pytest.raises(UserError, match="no file to be left out"):
        add(PopulationFolder.open(tmp_path / "pop"), paths, strict=True)
    assert PopulationFolder.open(tmp_path / "pop").names == ("0", "1")


def test_two_processes_do_not_write_at_once(write, tmp_path: Path):
    paths = [write(drawn(seed), f"{seed}.safetensors") for seed in range(2)]
    found = import_adapters(tmp_path / "pop", paths[:1], BASE)
    with found.locked(), pytest.raises(UserError, match="another process writes"):
        import_adapters(tmp_path / "pop", paths, BASE)
    assert len(import_adapters(tmp_path / "pop", paths, BASE)) == 2


def test_one_odd_file_does_not_decide_for_all(write, tmp_path: Path):
    paths = [write(drawn(seed), f"{seed}.safetensors") for seed in range(2)]
    convolution = write(drawn(5, modules=["mid.conv"]), "convolution.safetensors")
    found = import_adapters(tmp_path / "pop", [convolution, *paths], BASE)
    assert found.names == ("0", "1")
    assert "changes convolutions alone" in plan_import([convolution, *paths], BASE).skipped[0].reason
    with pytest.raises(UserError, match="convolutions alone"):
        plan_import([convolution, *paths], BASE, strict=True)
    others = [write(drawn(seed, modules=LINEAR[1:]), f"{seed}.safetensors") for seed in (8, 9)]
    odd = write(drawn(7, modules=LINEAR[:1]), "odd.safetensors")
    with pytest.raises(IncompatibleModelError, match=r"odd\.safetensors has the fewest in common"):
        plan_import([others[0], odd, others[1]], BASE)


def test_a_population_is_of_one_base(write, tmp_path: Path):
    path = write(drawn(0), "0.safetensors")
    import_adapters(tmp_path / "pop", [path], BASE)
    other = Base("other", "unet", {BACKBONE: SHAPES | {"mid.attn9.to_q": (6, 5)}})
    with pytest.raises(IncompatibleModelError, match="holds adapters of tiny"):
        import_adapters(tmp_path / "pop", [path], other)


def test_weights_of_peft_without_their_configuration_are_a_file(write, tmp_path: Path):
    folder = write(drawn(0), "lora", "peft")
    assert adapter_paths(tmp_path) == [folder]
    (folder / "adapter_config.json").unlink()
    assert adapter_paths(tmp_path) == [folder / "adapter_model.safetensors"]
    assert import_adapters(tmp_path / "pop", adapter_paths(tmp_path), BASE).names == ("lora",)


def test_a_header_that_was_kept_is_read_again_where_the_file_changed(write, tmp_path: Path):
    paths = [write(drawn(seed), f"{seed}.safetensors") for seed in range(2)]
    scans = plan_import(paths, BASE).scans
    write(drawn(6, rank=5), "1.safetensors")
    assert {pair.rank for pair in scans(paths[0]).pairs} == {2}
    assert {pair.rank for pair in scans(paths[1]).pairs} == {5}
