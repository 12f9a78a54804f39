"""Messages name the tensor and the first bad row; nothing bad passes in silence."""

import pytest
import torch

from immiscible_noise import assign_noise, diagnose, immiscible_noise_like, select_noise

pytestmark = pytest.mark.usefixtures("as_shipped")


def make(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def with_value(row: int, value: float) -> torch.Tensor:
    bad = make(6, 3, 2, 2)
    bad[row, 1, 0, 1] = value
    return bad


X = make(6, 3, 2, 2)


@pytest.mark.parametrize(
    ("x", "noise", "options", "message"),
    [
        (X, make(6, 3, 2, 3), {}, r"x has shape \[6, 3, 2, 2\] but noise has shape \[6, 3, 2, 3\]"),
        (X, make(4, 3, 2, 2), {}, "noise has no row 4"),
        (X.int(), X, {}, "x is torch.int32"),
        (X, X.long(), {}, "noise is torch.int64"),
        (X, X.bool(), {}, "noise is torch.bool"),
        (torch.tensor(1.0), torch.tensor(1.0), {}, "x is a single number"),
        (X, X.to("meta"), {}, "x is on cpu but noise is on meta"),
        (X, X, {"labels": [0, 1, 2]}, "labels has 3 rows but x has 6: row 3"),
        (X, X, {"labels": torch.zeros(8, dtype=torch.int64)}, "labels has 8 rows but x has 6: row 6"),
        (X, X, {"labels": torch.zeros(6)}, "labels is torch.float32"),
        (X, X, {"labels": ["a", "b", ["c"], "d", "e", "f"]}, r"labels\[2\] is a list"),
        (X, X, {"labels": list(torch.arange(6))}, r"labels\[0\] is a tensor inside a sequence"),
        (X, X, {"mask": torch.ones(6, 5)}, r"mask has shape \[6, 5\]"),
        (X, X, {"mask": torch.ones(6, 3, 2, 2, 1)}, r"mask has shape \[6, 3, 2, 2, 1\]"),
        (X, X, {"cost": "l3"}, "cost is 'l3'; choose from sq, l2, l1"),
        (X, X, {"condition": "soft"}, "condition is 'soft'"),
        (X, X, {"condition": "block"}, "condition='block' needs labels"),
        (X, X, {"solver": "emd"}, "solver is 'emd'"),
        (X, X, {"precision": "float16"}, "precision is 'float16'"),
        (X, X, {"precision": "bfloat16", "cost": "l1"}, "no matrix product"),
        (X, X, {"strength": 1.5}, r"strength is 1.5, outside \[0, 1\]"),
        (X, X, {"strength": float("nan")}, "strength is nan"),
        (1e30 * X, 1e30 * X, {}, "overflow"),
    ],
)
def test_assign(x, noise, options, message):
    with pytest.raises(ValueError, match=message):
        assign_noise(x, noise, **options)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="x is a ndarray"):
        assign_noise(X.numpy(), X)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cost", ["sq", "l2", "l1"])
@pytest.mark.parametrize("solver", ["scipy", "potentials+scipy"])
@pytest.mark.parametrize("labels", [None, [0, 0, 1, 1, 2, 3]])
@pytest.mark.parametrize("row", [1, 4])
def test_rows_that_are_not_finite(value, cost, solver, labels, row):
    bad = with_value(row, value)
    with pytest.raises(ValueError, match=rf"x\[{row}\] holds NaN or infinite values"):
        assign_noise(bad, X, cost=cost, solver=solver, labels=labels)
    with pytest.raises(ValueError, match=rf"noise\[{row}\] holds NaN or infinite values"):
        assign_noise(X, bad, cost=cost, solver=solver, labels=labels)


def test_like_refuses_integers():
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        immiscible_noise_like(X.long())


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (X, {"k": 0}, "k is 0"),
        (X, {"score": "cosine"}, "score is 'cosine'; choose from l2, inner"),
        (X[:0], {}, "x has no rows"),
        (X.int(), {}, "x is torch.int32"),
        (with_value(3, float("nan")), {}, r"x\[3\] holds NaN"),
    ],
)
def test_select(x, options, message):
    with pytest.raises(ValueError, match=message):
        select_noise(x, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [(X[:1], "x has 1 rows"), (X.int(), "x is torch.int32"), (with_value(5, float("inf")), r"x\[5\] holds NaN")],
)
def test_diagnose(x, message):
    with pytest.raises(ValueError, match=message):
        diagnose(x)
