"""`diffcore hooks`: the modules of a network, and the share of a forward pass up to each."""

from diffcore.cli.app import emit
from diffcore.cli.options import Flag, LoadingAny, load_model
from diffcore.runtime import Runtime


def hooks(
    model: str,
    patterns: tuple[str, ...],
    *,
    loading: LoadingAny = LoadingAny(),
    runtime: Runtime = Runtime(),
    json: Flag = False,
) -> int:
    """List the modules that patterns match, their outputs, and the share of a forward pass that is run until then.

    Shortest form: diffcore hooks FOLDER '*attn2.to_v'

    Args:
        model: Pipeline folder, backbone folder, or safetensors file.
        patterns: Shell patterns on dotted names; * crosses dots.
        json: Print one JSON object.
    """
    from diffcore.hooks import match
    from diffcore.models import site_table

    loaded = load_model(model, loading, runtime)
    sites = match(loaded.backbone, patterns)
    table = site_table(loaded.backbone, cond=77 if loaded.prompts is None else loaded.empty_condition(1))
    rows = [{"module": row.name, "shape": row.shape, "cost": row.cost} for row in (table[site.key] for site in sites)]
    if json:
        emit({"sites": rows}, as_json=True)
        return 0
    width = max(len(row["module"]) for row in rows)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) if row["shape"] else "does not run"
        print(f"{row['module']:<{width}}  {shape:<16}  {row['cost']:.1%} of a forward pass")
    return 0
