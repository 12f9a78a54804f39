"""What the assignment promises: rows moved bit for bit, the right optimum, invariances, blocks, masks, strength."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch._dynamo.utils import counters

from immiscible_noise import assign_noise, immiscible_noise_like
from immiscible_noise.cost import cost_matrix

SOLVERS = ["scipy", "sparse", "potentials+scipy"]
COSTS = ["sq", "l2", "l1"]


def make_pair(size: int = 32, shape: tuple[int, ...] = (3, 4, 4), *, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, *shape, generator=generator).to(dtype) for _ in range(2))


def permutation_of(x, noise, **options):
    return assign_noise(x, noise, return_info=True, **options)[1].permutation


def broadcast_costs(x, noise, cost):
    difference = x.double().flatten(1)[:, None] - noise.double().flatten(1)[None]
    return {
        "sq": difference.square().sum(2),
        "l2": torch.linalg.vector_norm(difference, dim=2),
        "l1": difference.abs().sum(2),
    }[cost]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_move_bit_for_bit(solver, dtype):
    x, noise = make_pair(dtype=dtype)
    assigned, info = assign_noise(x, noise, solver=solver, return_info=True)
    assert info.permutation.dtype == torch.int64
    assert sorted(info.permutation.tolist()) == list(range(32))
    assert assigned.dtype == dtype
    assert torch.equal(assigned, noise[info.permutation])
    assert not torch.equal(assigned, noise)


def test_memory_layout_is_the_noises():
    x, noise = make_pair()
    noise = noise.to(memory_format=torch.channels_last)
    assigned, info = assign_noise(x, noise, return_info=True)
    assert assigned.stride() == noise.stride()
    assert torch.equal(assigned, noise[info.permutation])


@pytest.mark.parametrize("shape", [(), (5,), (2, 7), (3, 4, 4), (2, 3, 4, 4)])
def test_any_data_shape(shape):
    x, noise = make_pair(9, shape)
    assert assign_noise(x, noise).shape == noise.shape


@pytest.mark.parametrize("size", [0, 1])
def test_nothing_to_exchange(size):
    x, noise = make_pair(size)
    assigned, info = assign_noise(x, noise, labels=["a"] * size, return_info=True)
    assert torch.equal(assigned, noise)
    assert assigned is not noise
    assert (info.solver, info.reduction, info.gap_bound) == ("none", 0.0, 0.0)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_brute_force(cost, solver):
    rows, every = torch.arange(6), torch.tensor(list(itertools.permutations(range(6))))
    for seed in range(16):
        x, noise = make_pair(6, (3,), seed=seed)
        costs = broadcast_costs(x, noise, cost)
        chosen = permutation_of(x, noise, cost=cost, solver=solver)
        assert float(costs[rows, chosen].sum()) == pytest.approx(float(costs[rows, every].sum(1).min()), rel=1e-6)


@pytest.mark.parametrize("cost", COSTS)
def test_same_permutation_as_broadcast_distances_in_float64(cost):
    x, noise = make_pair(64)
    expected = linear_sum_assignment(broadcast_costs(x * 0.7 + 0.3, noise, cost))[1]
    assert permutation_of(x * 0.7 + 0.3, noise, cost=cost).tolist() == expected.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_squared_cost_ignores_scale_and_mean(solver):
    x, noise = make_pair(64)
    expected = permutation_of(x, noise, solver=solver)
    offset = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(1))
    for other in (3.7 * x + offset, x - x.mean(0), 1e-3 * x, 1e4 * x):
        assert torch.equal(permutation_of(other, noise, solver=solver), expected)
    assert torch.equal(permutation_of(x, noise + offset, solver=solver), expected)


def test_unsquared_cost_depends_on_scale():
    x, noise = make_pair(64)
    scaled = [permutation_of(scale * x, noise, cost="l2") for scale in (1.0, 0.05)]
    assert not torch.equal(*scaled)


@pytest.mark.parametrize("cost", ["sq", "l2"])
def test_common_rotation_and_flip_change_nothing(cost):
    x, noise = make_pair(64)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1))).Q
    expected = permutation_of(x, noise, cost=cost)
    assert torch.equal(permutation_of(x.flip(-1), noise.flip(-1), cost=cost), expected)
    assert torch.equal(permutation_of(x.flatten(1) @ rotation, noise.flatten(1) @ rotation, cost=cost), expected)


@pytest.mark.parametrize("cost", COSTS)
def test_equivariance(cost):
    x, noise = make_pair(48)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    assigned = assign_noise(x, noise, cost=cost)
    assert torch.equal(assign_noise(x[shuffle], noise, cost=cost), assigned[shuffle])
    assert torch.equal(assign_noise(x, noise[shuffle], cost=cost), assigned)


def test_one_dimension_sorts():
    x, noise = make_pair(100, ())
    assigned = assign_noise(x, noise)
    assert torch.equal(assigned.argsort().argsort(), x.argsort().argsort())


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_cost_never_rises(cost, labelled, strength):
    for seed in range(10):
        x, noise = make_pair(24, (4,), seed=seed)
        labels = torch.arange(24) % 3 if labelled else None
        generator = torch.Generator().manual_seed(seed)
        options = {"cost": cost, "strength": strength, "generator": generator}
        assigned, info = assign_noise(x, noise, labels=labels, return_info=True, **options)
        assert info.cost_after <= info.cost_before
        assert info.reduction >= 0
        assert info.cost_before == pytest.approx(float(broadcast_costs(x, noise, cost).diagonal().mean()), rel=1e-5)
        assert info.cost_after == pytest.approx(float(broadcast_costs(x, assigned, cost).diagonal().mean()), rel=1e-5)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_certificate_in_the_units_of_the_cost(cost, solver):
    x, noise = make_pair(40, (8,))
    info = assign_noise(x, noise, cost=cost, solver=solver, return_info=True)[1]
    costs = broadcast_costs(x, noise, cost).numpy()
    optimum = costs[linear_sum_assignment(costs)].mean()
    assert -1e-4 * optimum <= info.cost_after - optimum <= info.gap_bound + 1e-5 * optimum
    assert info.gap_bound <= 1e-5 * optimum


@pytest.mark.parametrize("cost", COSTS)
def test_certificate_bounds_the_gap_of_a_poor_permutation(cost, monkeypatch):
    monkeypatch.setattr("immiscible_noise.assign.solve", lambda costs, _: np.arange(len(costs)))
    x, noise = make_pair(40, (8,))
    info = assign_noise(x, noise, labels=torch.arange(40) % 2, cost=cost, return_info=True)[1]
    costs = broadcast_costs(x, noise, cost).numpy()
    blocks = [costs[start::2, start::2] for start in (0, 1)]
    gap = info.cost_after - sum(block[linear_sum_assignment(block)].sum() for block in blocks) / 40
    assert 0.1 < gap <= info.gap_bound * (1 + 1e-5)
    assert info.gap_bound <= 5 * gap


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["list", "tuples", "tensor", "columns"])
def test_blocks_keep_their_rows_and_are_optimal(kind, solver):
    x, noise = make_pair(60)
    first, second = torch.arange(60) % 4, torch.arange(60) // 30
    pair_codes = first * 2 + second
    labels, codes = {
        "list": (["null" if i == 0 else f"class {i}" for i in first.tolist()], first),
        "tuples": (list(zip(first.tolist(), second.tolist(), strict=True)), pair_codes),
        "tensor": (first, first),
        "columns": (torch.stack([first, second], 1), pair_codes),
    }[kind]
    permutation = permutation_of(x, noise, labels=labels, solver=solver)
    assert torch.equal(codes[permutation], codes)
    for code in codes.unique():
        rows = (codes == code).nonzero()[:, 0]
        alone = permutation_of(x[rows], noise[rows])
        assert torch.equal(permutation[rows], rows[alone])


def test_ignoring_labels_is_the_plain_assignment_and_warns():
    x, noise = make_pair(32)
    with pytest.warns(UserWarning, match="condition='ignore'"):
        ignored = assign_noise(x, noise, labels=torch.arange(32) % 2, condition="ignore")
    assert torch.equal(ignored, assign_noise(x, noise))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_never_votes(cost, solver):
    x, noise = make_pair(32, (6, 4))
    lengths = torch.arange(32) % 6 + 1
    mask = torch.arange(6) < lengths[:, None]  # [b, tokens]
    expected = permutation_of(x, noise, mask=mask, cost=cost, solver=solver)
    for padding in (1e3, -7.0, float("nan")):
        padded = x.masked_fill(~mask[..., None], padding)
        assert torch.equal(permutation_of(padded, noise, mask=mask, cost=cost, solver=solver), expected)
    assert not torch.equal(permutation_of(x, noise, cost=cost, solver=solver), expected)


@pytest.mark.parametrize("cost", COSTS)
def test_masked_costs_are_those_of_the_data_alone(cost):
    x, noise = make_pair(30, (5,))
    mask = (torch.arange(5) < torch.arange(30)[:, None] % 5 + 1).float()
    difference = (x[:, None] - noise[None]).double() * mask[:, None]
    costs = {
        "sq": -((x * mask) @ noise.T).double(),
        "l2": torch.linalg.vector_norm(difference, dim=2),
        "l1": difference.abs().sum(2),
    }[cost]
    best = linear_sum_assignment(costs)[1]
    info = assign_noise(x, noise, mask=mask, cost=cost, return_info=True)[1]
    assert info.permutation.tolist() == best.tolist()
    assert info.cost_after <= info.cost_before


def test_mask_of_ones_changes_nothing():
    x, noise = make_pair(32)
    for cost in COSTS:
        assert torch.equal(
            assign_noise(x, noise, mask=torch.ones(32, 1, 1, 1), cost=cost), assign_noise(x, noise, cost=cost)
        )


def test_strength_zero_is_the_input_and_calls_no_solver(monkeypatch):
    monkeypatch.setattr("immiscible_noise.assign.solve", lambda *_, **__: pytest.fail("a solver was called"))
    x, noise = make_pair()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    untouched = assign_noise(x, noise, strength=0.0, generator=generator)
    assert torch.equal(untouched, noise)
    assert untouched.data_ptr() != noise.data_ptr()
    assert torch.equal(generator.get_state(), state)


def test_strength_one_draws_nothing():
    x, noise = make_pair()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assign_noise(x, noise, generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_assigns_a_random_subset_among_itself(labelled, solver):
    x, noise = make_pair(40)
    labels = torch.arange(40) % 2 if labelled else None
    seeded = torch.Generator().manual_seed
    permutation = permutation_of(x, noise, labels=labels, strength=0.5, generator=seeded(3), solver=solver)
    rows = torch.randperm(40, generator=seeded(3))[:20].sort().values
    outside = torch.ones(40, dtype=torch.bool)
    outside[rows] = False
    assert torch.equal(permutation[outside], torch.arange(40)[outside])
    subset_labels = None if labels is None else labels[rows]
    alone = permutation_of(x[rows], noise[rows], labels=subset_labels, solver=solver)
    assert torch.equal(permutation[rows], rows[alone])


def test_duplicate_images_take_their_noise_in_order():
    x, noise = make_pair(8)
    first = permutation_of(torch.cat([x[:1]] * 8), noise)
    assert first.tolist() == list(range(8))


def test_same_inputs_same_permutation():
    x, noise = make_pair(128, (16,))
    quantised = (x * 2).round()
    assert torch.equal(permutation_of(quantised, noise.round()), permutation_of(quantised, noise.round()))


def test_autocast_does_not_reach_the_costs():
    x, noise = make_pair(64)
    expected = assign_noise(x, noise, cost="l2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(assign_noise(x, noise, cost="l2"), expected)


def test_no_gradient_flows():
    x, noise = make_pair(8)
    assigned, info = assign_noise(x.requires_grad_(), noise.requires_grad_(), return_info=True)
    assert not assigned.requires_grad
    assert not info.pair_costs_after.requires_grad


def test_bfloat16_costs_lose_almost_nothing():
    x, noise = make_pair(256, (3, 16, 16))
    exact = assign_noise(x, noise, return_info=True)[1]
    rounded = assign_noise(x, noise, precision="bfloat16", return_info=True)[1]
    gain = exact.cost_before - exact.cost_after
    assert 0.99 * gain <= rounded.cost_before - rounded.cost_after <= gain * (1 + 1e-6)


LABELS = {
    "none": None,
    "tensor": torch.arange(16) % 3,
    "rows": torch.arange(32).reshape(16, 2) // 8,
    "array": np.arange(16) % 3,
    "strings": [str(i % 3) for i in range(16)],
    "tuples": tuple((i % 3, "x") for i in range(16)),
    "bools": torch.arange(16) % 2 == 0,
}


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(
    "options", [{}, {"strength": 0.5}, {"mask": torch.ones(16, 1, 1, 1)}], ids=["all", "half", "mask"]
)
def test_a_compiled_step_breaks_once_and_gives_the_same_noise(kind, options):
    x, noise = make_pair(16)
    torch._dynamo.reset()
    counters.clear()

    def step(x, noise):
        torch.manual_seed(0)
        return 2 * (x + assign_noise(x, noise, labels=LABELS[kind], **options))

    compiled = torch.compile(step, backend="eager")
    torch.testing.assert_close(compiled(x, noise), step(x, noise))
    reasons = [reason for reason in counters["graph_break"] if "manual_seed" not in reason]
    assert len(reasons) == 1


@pytest.mark.usefixtures("as_shipped")
def test_a_compiled_draw_breaks_once():
    x = make_pair(16)[0]
    counters.clear()
    compiled = torch.compile(lambda x: immiscible_noise_like(x) + x, backend="eager")
    assert compiled(x).shape == x.shape
    assert len(counters["graph_break"]) == 1


@pytest.mark.parametrize(
    "labels", [[f"a photo of {i}" for i in range(8)], torch.arange(8), np.arange(16).reshape(8, 2)]
)
def test_labels_that_all_differ_are_said_plainly(labels):
    x, noise = make_pair(8)
    with pytest.warns(UserWarning, match=r"all 8 labels of this batch differ.*nothing is assigned.*leave labels out"):
        assigned, info = assign_noise(x, noise, labels=labels, return_info=True)
    assert torch.equal(assigned, noise)
    assert assigned.data_ptr() != noise.data_ptr()
    assert (info.solver, info.reduction) == ("none", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assign_noise(x, noise, labels=[0, 0, *range(1, 7)], return_info=True)[1].solver != "none"


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_what_comes_back_is_never_the_callers_own(count, strength):
    noise = make_pair(4)[1][:count]
    assigned = assign_noise(torch.zeros_like(noise), noise, strength=strength)
    assigned += 1
    assert torch.equal(assigned, noise + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_is_a_draw_followed_by_an_assignment(dtype):
    x = make_pair(16, dtype=dtype)[0]
    seeded = torch.Generator().manual_seed
    noise = torch.randn(x.shape, generator=seeded(5), dtype=dtype)
    assert torch.equal(immiscible_noise_like(x, generator=seeded(5)), assign_noise(x, noise))
    labels = np.arange(16) % 2
    blocked = immiscible_noise_like(x, generator=seeded(5), labels=labels)
    assert torch.equal(blocked, assign_noise(x, noise, labels=labels))


@pytest.mark.parametrize("size", [300, 301])
def test_wide_products_are_products(size):
    # Large enough for oneDNN's product where the processor has AVX-512; rows as they lie in a batch that is strided.
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(80, size, generator=generator).T for _ in range(2))
    for cost, expected in (("sq", -x.double() @ noise.double().T), ("l2", torch.cdist(x.double(), noise.double()))):
        torch.testing.assert_close(cost_matrix(x, noise, cost=cost).double(), expected, rtol=1e-5, atol=1e-4)
    x.requires_grad_()
    cost_matrix(x, noise).sum().backward()
    torch.testing.assert_close(x.grad, -noise.sum(0).expand(x.shape))
