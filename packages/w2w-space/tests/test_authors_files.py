"""The authors' published files, on a small set in their layout that the tests write."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffcore.errors import CorruptArtifactError, UserError
from w2w_space.files.authors import import_authors, read_authors_point

# Alphabetical, as their files are: attn10 stands before attn2.
MODULES = {"down.attn1.to_q": (6, 5), "down.attn10.to_q": (4, 3), "down.attn2.to_q": (5, 4)}
N = 9


class Published:
    """A small set of the authors' files, and the numbers in them."""

    def __init__(self, folder: Path, *, negative: bool = True) -> None:
        g = torch.Generator().manual_seed(0)
        self.folder = folder
        self.table: dict[str, Any] = {}
        for name, (outputs, inputs) in MODULES.items():
            stem = f"base_model.model.{name}"
            self.table[f"{stem}.lora_A.identity1.weight"] = [(inputs,), torch.Size([1, inputs])]
            self.table[f"{stem}.lora_B.identity1.weight"] = [(outputs,), torch.Size([outputs, 1])]
        size = sum(sum(shape) for shape in MODULES.values())
        self.x = torch.randn(N, size, generator=g) * torch.linspace(0.5, 2, size) + 0.3
        self.mean, self.std = self.x.mean(0), self.x.std(0)
        z = (self.x - self.mean) / self.std
        self.v = torch.linalg.svd(z, full_matrices=False).Vh.T[:, : N - 1].contiguous()
        if negative:
            self.std[3::4] *= -1
            self.v[3::4] *= -1
        self.beta = ((self.x - self.mean) / self.std) @ self.v
        folder.mkdir(exist_ok=True)
        for name, value in {
            "mean": self.mean,
            "std": self.std,
            "V": self.v,
            "weight_dimensions": self.table,
            "proj_1000pc": self.beta,
        }.items():
            torch.save(value, folder / f"{name}.pt")

    def products(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns 27 B A of each module, by the formula of section 3.1 and the table alone."""
        found, start = {}, 0
        for name, (outputs, inputs) in MODULES.items():
            a = theta[start : start + inputs]
            b = theta[start + inputs : start + inputs + outputs]
            found[name] = 27 * torch.outer(b, a)
            start += inputs + outputs
        return found


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path / "authors")


def test_members_are_what_the_formula_gives(published: Published):
    space = import_authors(published.folder, allow_pickle=True)
    assert bool((space.scale < 0).any())
    assert space.layout.modules == tuple(MODULES)
    assert space.num_components == N - 1
    torch.testing.assert_close(space.variances.float(), published.beta.var(0), atol=1e-5, rtol=1e-5)
    for row in range(N):
        # With all components, theta = mu + s (V beta) is the member itself.
        theta = published.mean + published.std * (published.v @ published.beta[row])
        assert torch.allclose(theta, published.x[row], atol=1e-5)
        adapter = space.member(str(row)).adapter()
        for name, product in published.products(theta).items():
            change = adapter.modules[name].delta()
            assert float((change - product).norm() / product.norm()) < 1e-5


def test_projecting_an_adapter_of_theirs_gives_its_coefficients(published: Published):
    space = import_authors(published.folder, allow_pickle=True)
    for row in (0, 5):
        point = space.project(space.member(str(row)).adapter())
        assert torch.allclose(point.z * space.sigma, published.beta[row], atol=1e-4)
        assert point.residual is not None
        assert point.residual < 1e-4


def test_signs_matter(published: Published):
    torch.save(published.std.abs(), published.folder / "std.pt")
    space = import_authors(published.folder, allow_pickle=True)
    change = space.member("0").adapter().modules["down.attn1.to_q"].delta()
    product = published.products(published.x[0])["down.attn1.to_q"]
    assert float((change - product).norm() / product.norm()) > 0.1


def test_coefficients_are_computed_from_the_models_where_more_are_asked_for(published: Published):
    torch.save(published.beta[:, :3].clone(), published.folder / "proj_1000pc.pt")
    few = import_authors(published.folder, allow_pickle=True)
    assert few.num_components == 3
    torch.save(published.x, published.folder / "all_weights.pt")
    space = import_authors(published.folder, allow_pickle=True, num_components=6)
    assert space.num_components == 6
    assert torch.allclose(space.members * space.sigma, published.beta[:, :6], atol=1e-5)
    assert import_authors(published.folder, allow_pickle=True, num_components=2).num_components == 2
    (published.folder / "proj_1000pc.pt").unlink()
    assert import_authors(published.folder, allow_pickle=True).num_components == N - 1


def test_a_table_in_another_order_gives_the_same_changes(published: Published):
    """B before A, and modules in another order: the table decides."""
    whole = import_authors(published.folder, allow_pickle=True)
    keys = list(published.table)
    spans, start = {}, 0
    for key in keys:
        size = published.table[key][0][0]
        spans[key] = torch.arange(start, start + size)
        start += size
    turned = [keys[i] for i in (5, 4, 0, 1, 3, 2)]
    order = torch.cat([spans[key] for key in turned])
    torch.save({key: published.table[key] for key in turned}, published.folder / "weight_dimensions.pt")
    for name, value in (("mean", published.mean[order]), ("std", published.std[order]), ("V", published.v[order])):
        torch.save(value, published.folder / f"{name}.pt")
    other = import_authors(published.folder, allow_pickle=True)
    assert other.layout.modules == ("down.attn2.to_q", "down.attn1.to_q", "down.attn10.to_q")
    for name, change in whole.member("4").adapter().modules.items():
        assert change.relative_error(other.member("4").adapter().modules[name]) < 1e-6


def test_a_model_of_theirs_is_a_point(published: Published):
    space = import_authors(published.folder, allow_pickle=True)
    torch.save(published.beta[2:3, :4].bfloat16(), published.folder / "w2wmodel.pt")
    point = read_authors_point(published.folder / "w2wmodel.pt", space, allow_pickle=True)
    assert torch.allclose(point.z[:4] * space.sigma[:4], published.beta[2, :4].bfloat16().float(), atol=1e-5)
    assert not bool(point.z[4:].any())
    with pytest.raises(CorruptArtifactError, match="at most 3 numbers"):
        read_authors_point(published.folder / "w2wmodel.pt", space.truncated(3), allow_pickle=True)


class Program:
    def __reduce__(self):
        return (print, ("run",))


def test_pickles_need_permission_and_programs_are_refused(published: Published, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="`allow_pickle`"):
        import_authors(published.folder)
    space = import_authors(published.folder, allow_pickle=True)
    with pytest.raises(UserError, match="`allow_pickle`"):
        read_authors_point(published.folder / "mean.pt", space)
    torch.save(Program(), published.folder / "mean.pt")
    with pytest.raises(CorruptArtifactError, match="no file of tensors"):
        import_authors(published.folder, allow_pickle=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", torch.zeros(3), "27 numbers"),
        ("V", torch.zeros(3, 4), "27 rows"),
        ("weight_dimensions", {"x": [(3,), (1, 3)]}, "no table of factors"),
        ("weight_dimensions", torch.zeros(3), "no table of factors"),
        (
            "weight_dimensions",
            {
                f"base_model.model.m.lora_{part}.x.weight": [(6,), torch.Size(s)]
                for part, s in {"A": (2, 3), "B": (3, 2)}.items()
            },
            "rank above 1",
        ),
        ("mean", {"a": 1}, "holds no tensor"),
    ],
)
def test_files_that_do_not_fit_are_named(published: Published, name: str, value: Any, message: str):
    torch.save(value, published.folder / f"{name}.pt")
    with pytest.raises(CorruptArtifactError, match=message) as told:
        import_authors(published.folder, allow_pickle=True)
    assert f"{name}.pt" in str(told.value)


@pytest.mark.parametrize("name", ["mean", "std", "V", "proj_1000pc"])
def test_numbers_that_are_none_are_refused(published: Published, name: str):
    value = torch.load(published.folder / f"{name}.pt", weights_only=True).clone()
    value.view(-1)[2] = float("nan")
    torch.save(value, published.folder / f"{name}.pt")
    with pytest.raises(CorruptArtifactError, match="NaN or infinite"):
        import_authors(published.folder, allow_pickle=True)


def test_what_is_equal_in_all_models(published: Published):
    """A number stays what it is; along an equal coefficient there would be no standard deviation."""
    space = import_authors(published.folder, allow_pickle=True)
    torch.save(torch.tensor([float("nan")]), published.folder / "w2wmodel.pt")
    with pytest.raises(CorruptArtifactError, match="NaN or infinite"):
        read_authors_point(published.folder / "w2wmodel.pt", space, allow_pickle=True)
    std, v = published.std.clone(), published.v.clone()
    std[1], v[1] = 0.0, 0.0
    torch.save(std, published.folder / "std.pt")
    torch.save(v, published.folder / "V.pt")
    constant = import_authors(published.folder, allow_pickle=True)
    rows = torch.stack([constant.member(str(row)).vector for row in range(N)])
    assert bool((rows[:, 1] == published.mean[1]).all())
    assert torch.isfinite(constant.project(constant.member("3").adapter()).z).all()
    assert constant.fit.scale_ratio < float("inf")
    beta = published.beta.clone()
    beta[:, 2] = 0.5
    torch.save(beta, published.folder / "proj_1000pc.pt")
    with pytest.raises(CorruptArtifactError, match="along which all models are equal"):
        import_authors(published.folder, allow_pickle=True)
    assert import_authors(published.folder, allow_pickle=True, num_components=2).num_components == 2


def test_missing_files_are_named(published: Published):
    (published.folder / "proj_1000pc.pt").unlink()
    with pytest.raises(UserError, match=r"neither proj_1000pc\.pt nor all_weights\.pt"):
        import_authors(published.folder, allow_pickle=True)
    (published.folder / "V.pt").unlink()
    with pytest.raises(UserError, match=r"V\.pt is missing"):
        import_authors(published.folder, allow_pickle=True)
