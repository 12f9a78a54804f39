"""Presets, the paper's filter and its tables, against one another and against the published counts."""

import math
from collections.abc import Callable

import pytest
from scipy.stats import spearmanr

from diffcore.errors import UserError
from diffusion_featsel.inventory import Inventory
from diffusion_featsel.paper_filter import Family, family_of, paper_filter
from diffusion_featsel.presets import PRESETS, PROMPTS, preset
from diffusion_featsel.published import against_paper, published
from diffusion_featsel.selection import Selection

Real = Callable[[str], Inventory]
SUMS = {
    "sd15/practical": 3520,
    "sdxl/practical": 3840,
    "sd15/legacy": 3520,
    "sdxl/legacy": 2240,
    "sd15/amalgam": 3034,
    "pgv2/amalgam": 1280,
    "xl-t": 8154,
    "xl-t/ade": 7040,
    "dift/sd21": 1280,
}
CONFIGS = {"sd15": "sd15", "sd21": "sd21", "sdxl": "sdxl", "pgv2": "sdxl"}


@pytest.mark.parametrize("name", PRESETS)
def test_channels_of_presets(name: str, real_inventory: Real) -> None:
    found = preset(name)
    assert found.num_channels == SUMS[name]
    for model, selection in found.parts.items():
        rows = real_inventory(CONFIGS[model]).named(selection.names)
        assert {row.name: row.channels for row in rows} == found.channels[model]
        assert Selection.from_json(selection.to_json()) == selection


def test_protocols_of_presets() -> None:
    dift = preset("dift/sd21").selection
    assert (dift.t, dift.draws, dift.prompt, dift.details["size"]) == (261.0, 8, "", 768)
    assert dift.details["vae_sample"] is True
    practical = preset("sdxl/practical", task="horse21").selection
    assert (practical.t, practical.draws, practical.prompt) == (50.0, 1, "a photo of a horse")
    assert {part.prompt for part in preset("xl-t/ade").parts.values()} == {PROMPTS["ade20k"]}


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(UserError, match="sd15/practical"):
        preset("sd15/best")
    with pytest.raises(UserError, match="sdxl, sd15, pgv2"):
        _ = preset("xl-t").selection


def test_the_filter_keeps_the_rows_of_the_tables(real_inventory: Real) -> None:
    families: dict[Family, tuple[int, int]] = {"sdxl": (279, 63), "sd15": (146, 33)}
    for family, counts in families.items():
        names = [row.name for row in real_inventory(family)]
        assert real_inventory(family).family == family
        found = paper_filter(names, family)
        assert (len(found.candidates), len(found.kept)) == counts
        assert set(found.kept) == {row.name for row in published(family)}
        assert {*found.kept, *found.dropped} == set(names)
        assert not set(found.kept) & found.dropped.keys()


def test_the_filter_by_level(real_inventory: Real) -> None:
    def levels(model: str) -> list[int]:
        kept = paper_filter([row.name for row in real_inventory(model)], real_inventory(model).family or "sd15").kept
        return [sum(name.startswith(f"up-level{level}-") for name in kept) for level in range(4)]

    assert levels("sdxl") == [43, 20, 0, 0]
    assert levels("sd15") == [0, 12, 15, 6]


def test_all_blocks_add_candidates(real_inventory: Real) -> None:
    names = [row.name for row in real_inventory("sdxl").paper]
    found = paper_filter(names, "sdxl", all_blocks=True)
    assert len(found.candidates) == 612 - 140 - 70 - 3
    assert len(found.kept) == 63 + 3 * 4 * 2  # blocks 2, 4, 6 and 8 of level 0: query of cross-attention and result


def test_reasons_of_drops(real_inventory: Real) -> None:
    dropped = paper_filter([row.name for row in real_inventory("sdxl")], "sdxl").dropped
    assert dropped["unet-in"].startswith("not considered")
    assert dropped["up-level0-repeat0-res-inner"] == "not considered: of a kind that the paper does not list"
    assert dropped["up-level0-repeat0-vit-block2-out"].endswith("0, 1, 3, 5, 7 and 9 are")
    assert dropped["up-level0-repeat0-res-increment"].startswith("noise: an increment")
    assert dropped["up-level0-repeat0-vit-block0-self-q"].startswith("locality")
    assert dropped["up-level1-upsampler-out"].startswith("granularity")
    assert dropped["up-level2-repeat0-res-out"] == "noise: the last resolution"


def test_other_models_have_no_family() -> None:
    assert family_of(["unet-in"] * 3) is None
    assert family_of([f"name{number}" for number in range(197)]) is None
    with pytest.raises(ValueError, match="no name of an activation"):
        paper_filter(["conv_in"], "sd15")


def test_tables_hold_the_numbers_that_the_paper_marks() -> None:
    sd15 = {row.name: row for row in published("sd15")}
    assert [len(published(model)) for model in ("sd15", "sdxl", "pgv2")] == [33, 63, 63]
    assert max(sd15.values(), key=lambda row: row.simple).name == "up-level2-repeat1-vit-block0-cross-q"
    assert max(sd15.values(), key=lambda row: row.complex).name == "up-level1-repeat1-vit-block0-cross-q"
    assert max(published("pgv2"), key=lambda row: row.simple).simple == 59.04
    assert max(published("pgv2"), key=lambda row: row.complex).complex == 49.77


def test_agreement_with_the_paper() -> None:
    table = published("sdxl")
    exact = against_paper({row.name: row.complex for row in table}, "sdxl")
    assert (exact.n, exact.complex, exact.regret_complex, exact.missing) == (63, 1.0, 0.0, ())
    assert exact.simple == pytest.approx(spearmanr([r.complex for r in table], [r.simple for r in table])[0])
    assert exact.doubtful == ("up-level0-repeat0-vit-block3-out", "up-level0-repeat0-vit-block7-out")
    worst = against_paper({row.name: -row.simple for row in table}, "sdxl")
    assert worst.simple == pytest.approx(-1.0)
    assert worst.regret_simple == pytest.approx(58.95 - 27.61)


def test_few_or_undefined_scores() -> None:
    names = [row.name for row in published("sd15")]
    scores = dict(zip(names, [1.0, 2.0, 3.0, math.nan], strict=False)) | {"unet-in": 9.0}
    found = against_paper(scores, "sd15")
    assert (found.n, found.best, len(found.missing)) == (3, names[2], 30)
    with pytest.raises(UserError, match="different values"):
        against_paper(dict.fromkeys(names, 1.0), "sd15")
    with pytest.raises(UserError, match="has 0 of the 33"):
        against_paper({"unet-in": 1.0}, "sd15")
