"""`diffcore metrics`: how close generated images come to real ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from diffcore.cli.app import settings, track
from diffcore.cli.job import Job
from diffcore.cli.options import Flag, Output
from diffcore.runtime import Runtime


def metrics(
    real: Path,
    fake: Path,
    *,
    features: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    prompts: Path | None = None,
    clip: Path | None = None,
    batch_size: int = 32,
    max_pixels: int = 64_000_000,
    allow_pickle: Flag = False,
    strict: Flag = False,
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure generated images against real ones: every metric from one reading of the images, with intervals.

    Shortest form: diffcore metrics REAL FAKE

    Fréchet distance beside its real-against-real value and extrapolated, kernel distance (KID), precision, recall,
    density, coverage; the CLIP score where prompts are given. Interrupted, the same command goes on where it stopped.

    Args:
        real: Folder or zip of real images, or clean-fid's statistics (.npz) of their Inception features.
        fake: Folder or zip of generated images.
        features: Networks to compare in: inception:FILE, clip:FOLDER, dino:FOLDER, sscd:FILE (a share of copies as
            well), random:SEED; by default random:0, which needs no file.
        prompts: Text, CSV or JSON lines with the prompts of the generated images, in the order of the numbers in their
            names, or with a column file_name; or the folder itself, where a text file beside each image holds its own.
        clip: Folder of the CLIP that scores images by their prompts; by default the one among the features.
        batch_size: Images per forward pass; results depend on it in their last bits.
        max_pixels: Width times height above which a file is left out undecoded.
        allow_pickle: Run TorchScript files (inception, sscd), which are code; only from authors you trust. ONNX files,
            which SSCD may be in, are data.
        strict: Stop at the first unreadable image or prompt instead of leaving it out.
    """
    from diffcore.metrics.prepare import prepare, refuse_place

    folder = output.out or Path("runs") / f"metrics-{real.stem}-{fake.stem}"
    refuse_place(folder, (real, fake))
    runtime.apply_threads()
    options: dict[str, Any] = {"prompts": prompts, "clip": clip, "batch_size": batch_size, "max_pixels": max_pixels}
    ready = prepare(real, fake, features, runtime, **options, allow_pickle=allow_pickle, strict=strict)
    config = settings(runtime=runtime, **ready.config)
    job = Job("diffcore metrics", folder, output, config, ready.inputs)
    return job(lambda run, _: ready.measure(run, track), plan=ready.plan(), shown=_in_lines)


def _in_lines(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line per number in place of the table."""
    rows = result["metrics"]
    lines = {
        f"{row['metric']} ({row['features']})": f"{row['value']:.4g}"
        + ("" if row["low"] is None else f"  [{row['low']:.4g}, {row['high']:.4g}]")
        for row in rows
    }
    return {name: value for name, value in result.items() if name != "metrics"} | lines
