"""The commands that make a space: build."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Job, Output
from w2w_space.app.options import Reading, Sources

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap
    from w2w_space.files.population import PopulationFolder


_TESTED, _UNTESTED = 2000, 1000  # members up to which components are tested, and components of more
_PRODUCTS = 50  # components of a space of products, whose chance is not tested


def build(
    sources: Sources,
    *,
    geometry: Literal["factors", "product"] = "factors",
    gauge: Literal["canonical", "raw"] = "canonical",
    scaling: Literal["standard", "module", "none"] = "standard",
    like: Path | None = None,
    num_components: int | None = None,
    solver: Literal["gram", "covariance", "iterative"] | None = None,
    members: Annotated[bool, Parameter(negative="--no-members")] = True,
    precision: Literal["float16", "float32"] = "float16",
    reading: Reading = Reading(),
    output: Output = Output(),
) -> int:
    """Fit the linear space over a population, or over LoRA files of any layout, and say how good it is.

    Shortest form: w2w-space build POPULATION

    SOURCES may also be the folder of one population. RUN/space.safetensors is what the other commands take.

    Args:
        geometry: Make a space that is linear in the factors (paper), or in their products: the changes of the weights.
        gauge: Use canonical to remove the freedom of the factors, raw for vectors as they are (published code).
        scaling: Divide each number by its standard deviation (paper), each module by its own, or nothing.
        like: Earlier space of a part of the members, whose gauge and scale are kept: what was learned of its members'
            vectors stays true of the new space.
        num_components: Number of components; by default those that vary more than permuted numbers do (all, of fewer
            than 20 members; 1000, of more than 2000; 50 of products).
        solver: Way to the components: gram holds the inner products of all members, covariance those of all numbers,
            iterative neither; by default the smaller table of at most 20 000 rows.
        members: Keep the members' names and coordinates; without them nobody can get the members back.
        precision: Precision of the stored components.
    """
    from diffcore.errors import UserError
    from w2w_space.app.inputs import (
        about_plan,
        adapters_at,
        base_for,
        digest_of_files,
        imported,
        is_population,
        planned,
    )
    from w2w_space.app.report import save_map_parts, save_space_parts, write_page
    from w2w_space.diagnose import cross_fitted, diagnosed
    from w2w_space.files.population import MEMBERS, PopulationFolder
    from w2w_space.files.previews import previews
    from w2w_space.files.space import load_space, save_space
    from w2w_space.product_space import ProductSpace
    from w2w_space.space import WeightSpace, require_enough

    if geometry == "product" and (gauge, scaling, like, solver, members) != ("canonical", "standard", None, None, True):
        raise UserError("`geometry` product knows no gauge, scaling or solver, and consists of its members: omit these")
    if num_components is not None and num_components < 1:
        raise UserError(f"`num_components` is {num_components}; give at least 1")
    stored = PopulationFolder.open(sources[0]) if len(sources) == 1 and is_population(sources[0]) else None
    paths = [] if stored is not None else adapters_at(sources)
    require_enough(len(paths) if stored is None else len(stored))
    options = {
        **{
            "sources": list(sources),
            "geometry": geometry,
            "gauge": gauge,
            "scaling": scaling,
            "like": like,
            "num_components": num_components,
        },
        **{"solver": solver, "members": members, "precision": precision, **asdict(reading)},
    }

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        found = stored or imported(run.folder / "population", paths, base_for(paths, reading.model), reading)
        population = found.population()
        if geometry == "product":
            whole = ProductSpace.build(population)
            kept, _ = cross_fitted(whole, num_components=min(num_components or _PRODUCTS, whole.num_components))
            save_space(kept, run.folder / "space.safetensors", base=found.base, dtype=precision)
            save_space_parts(run, kept)
            _keep_members(run, found)
            return _summary(kept, len(whole.variances), len(found.skipped))
        tested = len(population) <= _TESTED
        space = WeightSpace.build(
            population,
            gauge=gauge,
            scaling=scaling,
            like=None if like is None else load_space(like),
            num_components=None if tested else num_components or _UNTESTED,
            solver=solver,
        )
        spanned, chance = len(population) - 1, {}
        if tested:
            told = diagnosed(population, space, num_components=num_components)
            space, spanned, chance = told.space, len(told.variances), {"variances": told.variances}
            chance |= {"limits": told.limits}
        made = {name: found.facts[name] for name in ("recipe", "prompt", "model_fingerprint") if name in found.facts}
        save_space(space, run.folder / "space.safetensors", base=found.base, dtype=precision, members=members, **made)
        save_space_parts(run, space, **chance)
        if members:
            _keep_members(run, found)
            save_map_parts(run, space, previews(found.members))
        elif stored is None:
            _forget(run.folder / "population")
        return _summary(space, spanned, len(found.skipped))

    def plan() -> dict[str, Any]:
        if stored is None:
            return about_plan(paths, *planned(paths, reading))
        return {"members": len(stored), "rank": stored.layout.rank, "numbers": stored.layout.size}

    read = [stored.folder / MEMBERS] if stored is not None else paths
    folder = output.out or Path("runs") / f"build-{sources[0].stem}"
    job = Job("w2w-space build", folder, output, options, {"adapters": digest_of_files(read)})
    return job(compute, plan=plan, report=write_page)


def _keep_members(run: "Run", found: "PopulationFolder") -> None:
    rows = [
        {"member": m.name, "rank": m.rank, "loss": m.loss, "in other modules": m.dropped, "file": Path(m.source).name}
        for m in found.members
    ]
    run.table("members", rows)
    if found.skipped:
        skipped = [{"file": Path(line.source).name, "reason": line.reason} for line in found.skipped]
        run.keep_table("skipped", skipped, "Files that are no members.")


def _forget(folder: Path) -> None:
    """Deletes the members of a space that shall not tell them."""
    import shutil

    from diffcore.io import files

    with files.explained(folder):
        shutil.rmtree(folder)


def _summary(space: Any, spanned: int, skipped: int) -> dict[str, Any]:
    from w2w_space.app.report import answer_of
    from w2w_space.space import about

    return {
        "answer": answer_of(space, spanned),
        **about(space),
        "left_out": skipped,
        "fingerprint": space.fingerprint[:16],
    }
