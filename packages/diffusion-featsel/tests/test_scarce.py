"""Ten networks side by side are ten networks one after the other, and vote as scipy counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_featsel.gram import labels_on_grid
from diffusion_featsel.interpolation import centres, values_at
from diffusion_featsel.probe import ProbeSettings, probe
from diffusion_featsel.scarce import Ensemble, ScarceSettings, fit_ensemble, most_frequent, vote, without_rare
from diffusion_featsel.segmentation import segmentation_scores
from diffusion_featsel.splits import image_splits

SETTINGS = ScarceSettings(grid=(8, 6), num_networks=3, max_epochs=9, first_watched=2, patience=3, rare=2, batch_size=16)


def data() -> tuple[dict[str, Tensor], Tensor]:
    """Returns features of two sizes and labels that can partly be read from them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (3, 8, 6), generator=generator)
    shown = F.one_hot(labels, 3).permute(0, 3, 1, 2) + 0.5 * torch.randn(3, 3, 8, 6, generator=generator)
    labels[0, 0, :3] = 255
    return {"a": shown, "b": torch.randn(3, 2, 4, 3, generator=generator)}, labels


def plain_network(networks: Ensemble, index: int) -> nn.Sequential:
    """Returns one network of the ensemble as ordinary modules."""
    weights = [p.detach()[index].clone() for p in networks.parameters[:6]]
    sizes = [weights[0].shape[0], *(w.shape[1] for w in weights[::2])]
    layers: list[nn.Module] = []
    for layer in range(3):
        linear = nn.Linear(sizes[layer], sizes[layer + 1])
        linear.weight.data, linear.bias.data = weights[2 * layer].T.contiguous(), weights[2 * layer + 1][0]
        layers += [linear] if layer == 2 else [linear, nn.ReLU(), nn.BatchNorm1d(sizes[layer + 1])]
    return nn.Sequential(*layers)


def one_after_the_other(features: dict[str, Tensor], labels: Tensor) -> tuple[list[nn.Sequential], list[int]]:
    """Trains ordinary modules on the same orders, and returns them with their numbers of steps."""
    grid = SETTINGS.grid
    rows = torch.stack(torch.meshgrid(centres(grid[0]), centres(grid[1]), indexing="ij")[::-1], -1).flatten(0, 1)
    x = torch.cat([values_at(m, rows.expand(len(m), -1, 2)).flatten(0, 1) for m in features.values()], 1)
    y = without_rare(labels_on_grid(labels, grid), 3, SETTINGS.rare).flatten()
    x, y = x[y != 255], y[y != 255]
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    ensemble = Ensemble(5, 3, 3, generator)
    networks = [plain_network(ensemble, index) for index in range(3)]
    orders = [[torch.randperm(len(x), generator=generator) for _ in range(3)] for _ in range(SETTINGS.max_epochs)]
    steps = []
    for index, network in enumerate(networks):
        adam = torch.optim.Adam(network.parameters(), lr=SETTINGS.learning_rate)
        smallest, waited, count, stopped = float("inf"), 0, 0, False
        for epoch in range(SETTINGS.max_epochs):
            for batch in orders[epoch][index].split(16)[: len(x) // 16]:
                loss = F.cross_entropy(network(x[batch]), y[batch])
                adam.zero_grad()
                loss.backward()
                adam.step()
                count += 1
                if epoch >= SETTINGS.first_watched:
                    value = loss.item()
                    smallest, waited = (value, 0) if value < smallest else (smallest, waited + 1)
                if waited > SETTINGS.patience:
                    stopped = True
                    break
            if stopped:
                break
        steps.append(count)
    return [network.eval() for network in networks], steps


def test_side_by_side_equals_one_after_the_other() -> None:
    features, labels = data()
    networks, steps = one_after_the_other(features, labels)
    assert len(set(steps)) > 1  # they stop at different steps
    ensemble = fit_ensemble(features, labels, 3, SETTINGS)
    x = torch.randn(1, 20, 5).expand(3, -1, -1)
    expected = torch.stack([network(x[0]) for network in networks])
    torch.testing.assert_close(ensemble(x), expected, atol=2e-4, rtol=1e-3)


def test_the_first_weights_and_shapes_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = Ensemble(40, 29, 10, generator), Ensemble(40, 30, 10, generator)
    assert [tuple(p.shape[1:]) for p in few.parameters[:6:2]] == [(40, 128), (128, 32), (32, 29)]
    assert [tuple(p.shape[1:]) for p in many.parameters[:6:2]] == [(40, 256), (256, 128), (128, 30)]
    assert few.parameters[0].std().item() == pytest.approx(0.02, rel=0.02)
    assert not bool(few.parameters[1].any())
    assert ScarceSettings() == ScarceSettings((256, 256), 10, 1e-3, 64, 100, 4, 50, 20, 0)


def test_the_vote_is_the_mode_of_scipy() -> None:
    choices = torch.randint(4, (10, 500), generator=torch.Generator().manual_seed(0))
    expected = stats.mode(choices.numpy(), axis=0).mode
    np.testing.assert_array_equal(most_frequent(choices, 4).numpy(), expected)


def test_votes_and_uncertainty_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data()
    networks = fit_ensemble(features, labels, 3, SETTINGS)
    voted = vote(networks, features, (8, 6))
    rows = torch.stack(torch.meshgrid(centres(8), centres(6), indexing="ij")[::-1], -1).flatten(0, 1)
    x = torch.cat([values_at(m, rows.expand(3, -1, 2)) for m in features.values()], 2)
    for image in range(3):
        shares = networks(x[image].expand(3, -1, -1)).softmax(2).detach().numpy()
        expected = stats.mode(shares.argmax(2), axis=0).mode
        np.testing.assert_array_equal(voted.classes[image].flatten().numpy(), expected)
        disputed = stats.entropy(shares.mean(0), axis=1) - stats.entropy(shares, axis=2).mean(0)
        assert float(voted.uncertainty[image]) == pytest.approx(np.sort(disputed)[-5:].mean(), abs=1e-5)
    monkeypatch.setattr("diffusion_featsel.scarce._CHUNK", 1)
    assert torch.equal(vote(networks, features, (8, 6)).classes, voted.classes)


def test_rare_classes_do_not_train() -> None:
    classes = torch.zeros(2, 5, 5, dtype=torch.long)
    classes[0, 0, 0], classes[1, 0] = 1, 1
    kept = without_rare(classes, 2, 3)
    assert int(kept[0, 0, 0]) == 255
    assert torch.equal(kept[1], classes[1])
    assert torch.equal(without_rare(classes, 2, 5)[1], classes[1])  # five are not fewer than five


def test_the_probe_trains_and_votes() -> None:
    features, labels = data()
    labels = labels.repeat(2, 1, 1)
    features = {name: maps.repeat(2, 1, 1, 1) for name, maps in features.items()}
    found = probe(features, labels, "mlp-ensemble", settings=ProbeSettings(num_splits=2, scarce=SETTINGS))
    assert len(found.scores) == 2
    assert found.pixel_accuracy.mean > 0.5
    seeded = replace(SETTINGS, seed=3, max_epochs=2)
    found = probe(features, labels, "mlp-ensemble", settings=ProbeSettings(num_splits=1, num_train=2, scarce=seeded))
    classes = labels_on_grid(labels, SETTINGS.grid)
    assert found.splits == image_splits(classes, 3, num_train=2, num_splits=1, seed=3)
    train, test = list(found.splits[0].train), list(found.splits[0].test)
    networks = fit_ensemble({name: maps[train] for name, maps in features.items()}, labels[train], 3, seeded)
    voted = vote(networks, {name: maps[test] for name, maps in features.items()}, SETTINGS.grid)
    expected = segmentation_scores(voted.classes, classes[test], 3)
    assert found.pixel_accuracy.mean == pytest.approx(expected.pixel_accuracy, abs=0.01)


def test_one_batch_is_enough_and_the_seed_decides() -> None:
    features, labels = data()
    labels[0], labels[1:] = 0, 255
    labels[0, :, 2:] = 255
    found = [
        fit_ensemble(features, labels, 3, replace(SETTINGS, max_epochs=1, seed=seed)).parameters[4]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    labels[0, 0, 0] = 255
    features = {name: maps[:1] for name, maps in features.items()}
    with pytest.raises(ValueError, match="15 labelled pixels, fewer than one batch of 16"):
        fit_ensemble(features, labels[:1], 3, SETTINGS)
