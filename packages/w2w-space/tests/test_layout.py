"""Vectors of adapters: their table, and the way from any rank to one."""

import pytest
import torch

from diffcore.adapters import Adapter, LowRank
from diffcore.errors import IncompatibleModelError
from diffcore.testing import real_configs
from w2w_space.layout import Layout, common_layout
from w2w_space.population import Population, commonest_rank, vector_of
from w2w_space.ranks import at_rank


def change(outputs: int, inputs: int, rank: int, alpha: float | None = None, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=g), torch.randn(outputs, rank, generator=g)
    return LowRank(down, up, float(rank) if alpha is None else alpha)


def test_sd15_has_the_published_number_of_numbers():
    """Counts 64 modules and 99 648 numbers, 49 920 of self-attention and 49 728 of cross-attention."""
    import json
    from pathlib import Path

    import accelerate
    import diffusers

    config = json.loads((Path(real_configs.__file__).parent / "sd15" / "unet" / "config.json").read_text())
    with accelerate.init_empty_weights():
        unet = diffusers.UNet2DConditionModel.from_config(config)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_v")) and isinstance(module, torch.nn.Linear)
    }
    layout = Layout.of(shapes, rank=1)
    assert (len(layout.modules), layout.size) == (64, 99_648)
    size = {name: span.stop - span.start for name, span in zip(layout.modules, layout.spans, strict=True)}
    assert sum(count for name, count in size.items() if "attn1" in name) == 49_920
    assert sum(count for name, count in size.items() if "attn2" in name) == 49_728
    stages = [name.split("_")[0] for name in layout.modules]
    assert stages == sorted(stages, key=["down", "mid", "up"].index)  # by name is down, mid, up


def test_a_vector_holds_the_change_whatever_the_scale():
    adapter = Adapter({"to_v": change(5, 4, 1, alpha=27.0), "to_q": change(3, 4, 1, alpha=0.5)})
    layout = common_layout([adapter], rank=1)
    back = layout.adapter(layout.vector(adapter))
    for name, one in adapter.modules.items():
        torch.testing.assert_close(back.modules[name].delta(), one.delta())
    assert Layout.from_json(layout.to_json()) == layout


def test_convolutions_keep_their_kernels():
    g = torch.Generator().manual_seed(0)
    adapter = Adapter({"conv": LowRank(torch.randn(2, 3, 3, 3, generator=g), torch.randn(5, 2, generator=g), 4.0)})
    with pytest.raises(IncompatibleModelError, match="no module is changed by all"):
        common_layout([adapter], rank=2)
    layout = common_layout([adapter], rank=2, convolutions=True)
    back = layout.adapter(vector_of(adapter, layout)[0])
    torch.testing.assert_close(back.modules["conv"].delta(), adapter.modules["conv"].delta())


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
def test_the_loss_is_that_of_the_products(rank: int):
    """The stated loss of a cut to a lower rank is the measured one, and a higher rank loses nothing."""
    whole = change(9, 6, 4, alpha=10.0)
    cut, loss = at_rank(whole, rank)
    assert cut.rank == rank
    error = float((cut.delta(torch.float64) - whole.delta(torch.float64)).norm() / whole.delta(torch.float64).norm())
    assert loss.relative == pytest.approx(error, abs=1e-6)
    best = torch.linalg.svdvals(whole.delta(torch.float64))
    assert error == pytest.approx(float(best[rank:].norm() / best.norm()), abs=1e-6)
    if rank >= 4:
        assert loss.relative == 0.0


def test_members_of_mixed_ranks_become_one_population():
    adapters = [
        Adapter({"a": change(5, 4, 2, seed=1), "b": change(3, 4, 2, seed=2)}, name="two"),
        Adapter({"a": change(5, 4, 2, seed=3), "b": change(3, 4, 1, seed=4), "c": change(3, 4, 2)}, name="mixed"),
        Adapter({"a": change(5, 4, 3, seed=5), "b": change(3, 4, 2, seed=6)}, name="three"),
    ]
    assert commonest_rank(adapters) == 2
    population, losses = Population.of(adapters)
    assert population.layout.modules == ("a", "b")
    assert [loss.relative == 0 for loss in losses] == [True, True, False]
    back = population.layout.adapter(population.vectors.rows([1])[0])
    torch.testing.assert_close(back.modules["b"].delta(), adapters[1].modules["b"].delta())


def test_other_shapes_and_layers_are_refused_by_name():
    first, other = Adapter({"a": change(5, 4, 1)}, name="one"), Adapter({"a": change(6, 4, 1)}, name="two")
    with pytest.raises(IncompatibleModelError, match=r"two changes 'a' of shape \(6, 4\)"):
        common_layout([first, other], rank=1)
    layout = common_layout([first], rank=1)
    with pytest.raises(IncompatibleModelError, match="two has rank 1 and shape"):
        layout.vector(other)
    with pytest.raises(IncompatibleModelError, match="changes 'z', which is not among"):
        layout.vector(Adapter({"z": change(5, 4, 1)}, name="three"))
    with pytest.raises(ValueError, match="two members are called"):
        Population.of([first, first])
