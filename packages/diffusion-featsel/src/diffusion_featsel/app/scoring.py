"""What the command `score` does beside the method: conditions, filters, and the comparison with the paper."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.run import Run, RunMap
from diffusion_featsel.app.inputs import protocol_of
from diffusion_featsel.app.options import Extraction, FilterName
from diffusion_featsel.forward import activations_of, noised
from diffusion_featsel.inventory import Inventory
from diffusion_featsel.measured_filter import Filtered, FilterSettings, measured_filter
from diffusion_featsel.paper_filter import family_of, paper_filter
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.protocol import Conditions
from diffusion_featsel.published import PublishedModel, against_paper, published
from diffusion_featsel.rank import score
from diffusion_featsel.ranking import Ranking

_PARTS = 4  # a run that was interrupted loses a quarter of the pass at most


def check(
    model: DiffusionModel,
    listed: Inventory,
    extraction: Extraction,
    *,
    other_t: float | None,
    filter: FilterName,
    keep: Sequence[str],
    against: PublishedModel | None,
) -> None:
    """Raises a UserError for options that this model cannot follow, before anything is computed.

    Args:
        model: Diffusion model that is looked into.
        listed: Inventory of the model.
        extraction: Options of the command line.
        other_t: Second timestep, if any.
        filter: Name of the filter.
        keep: Patterns of names that are never dropped.
        against: Model of the paper that the ranking is compared with.
    """
    protocol = protocol_of(extraction)
    protocol.timesteps(model, extraction.timestep)
    if other_t is not None:
        protocol.timesteps(model, other_t)
    if filter == "paper":
        require_family(listed)
    if keep:
        listed.match(keep)
    if against is not None and len({row.name for row in published(against)} & {row.name for row in listed.rows}) < 3:
        raise UserError(f"`against_paper` is {against}, whose names this {listed.model_class} does not have")


def ranked(
    model: DiffusionModel,
    images: Float[Tensor, "n 3 h w"],
    listed: Inventory,
    extraction: Extraction,
    other_t: float | None,
    map: RunMap,
) -> tuple[Ranking, dict[str, Tensor]]:
    """Returns the ranking, and the first image's maps.

    Args:
        model: Diffusion model that is looked into.
        images: Images at the network's size, in [0, 1].
        listed: Inventory for their size.
        extraction: Options of the command line.
        other_t: Second timestep, if any.
        map: Keeps finished parts in the run, and shares them among processes.
    """
    protocol = protocol_of(extraction)
    t = protocol.timesteps(model, extraction.timestep)[0]
    condition = Conditions(model)(extraction.prompt or "", size=(images.shape[2], images.shape[3]))
    ranking = score(
        model,
        images,
        listed.features,
        t=t,
        other_t=other_t,
        condition=condition,
        seed=extraction.seed,
        batch_size=extraction.rows(48),
        parts=_PARTS,
        map=map,
    )
    x_t = noised(
        model, model.codec.encode(images[:1].to(model.device)), image_keys(images[:1]), t, seed=extraction.seed
    )
    shown = [row.activation for row in ranking.rows]
    return ranking, activations_of(model, x_t, t, condition, shown)


def filtered_by(
    name: FilterName, ranking: Ranking, listed: Inventory, image_side: int, keep: Sequence[str]
) -> Filtered:
    """Returns what a filter keeps and drops of the ranked activations.

    Args:
        name: Name of the filter.
        ranking: Ranking of the model's activations.
        listed: Inventory of the model.
        image_side: Longer side of the images in pixels.
        keep: Patterns of names that are never dropped.

    Raises:
        UserError: The paper has no rule for the model.
    """
    activations = [row.activation for row in ranking.rows]
    names = [activation.name for activation in activations]
    if name == "none":
        return Filtered(tuple(names))
    if name == "measured":
        reliability = {row.name: row.reliability for row in ranking.rows}
        settings = FilterSettings(keep=tuple(keep))
        return measured_filter(activations, reliability, ranking.similarity, image_side=image_side, settings=settings)
    rule = paper_filter(names, require_family(listed))
    saved = [name for name in names if any(fnmatchcase(name, pattern) for pattern in keep)]
    kept = tuple(name for name in names if name in rule.kept or name in saved)
    return Filtered(kept, {name: reason for name, reason in rule.dropped.items() if name not in saved})


def require_family(listed: Inventory) -> Any:
    """Returns the architecture whose names the paper's rule is written for.

    Args:
        listed: Inventory of the model.

    Raises:
        UserError: The model is neither SD 1.x, SD 2.x nor SDXL.
    """
    family = family_of([row.name for row in listed.paper])
    if family is None:
        raise UserError(
            f"the paper's `filter` is for SD 1.x, 2.x and SDXL, and this {listed.model_class} is neither; use measured"
        )
    return family


def tell_paper(run: Run, scores: Mapping[str, float], model: PublishedModel) -> dict[str, Any]:
    """Compares scores with the paper's tables, and keeps a table for the report.

    Args:
        run: Run that keeps the table.
        scores: Score of each activation by name.
        model: Model of the paper.
    """
    found = against_paper(scores, model)
    rows = [
        {"scenes": "simple (Horse-21)", "Spearman": found.simple, "regret, points of mIoU": found.regret_simple},
        {"scenes": "complex (Bedroom-28)", "Spearman": found.complex, "regret, points of mIoU": found.regret_complex},
    ]
    doubt = f" Numbers that may be a slip in the paper: {', '.join(found.doubtful)}." if found.doubtful else ""
    run.keep_table(
        "paper",
        rows,
        f"{found.n} activations that both have scored, tables 4 to 6 of the paper; best here is {found.best}.{doubt}",
    )
    return {"against_paper": {"model": model, "n": found.n, "simple": found.simple, "complex": found.complex}}
