"""Statistics of ordinary prompts as a small safetensors file and its sidecar."""

from pathlib import Path

import torch

from diffcore.errors import CorruptArtifactError, UserError, printable
from diffcore.io import artifact
from nemo_localize.statistics import Statistics

FILE = "statistics.safetensors"
_SCHEMA = "nemo-localize/statistics@1"
_PICKLES = (".pt", ".pth", ".bin", ".pkl")


def save_statistics(path: Path, statistics: Statistics) -> Path:
    """Writes statistics, and returns the path of the file."""
    return artifact.save(
        path,
        {
            "mean": statistics.mean,
            "var": statistics.var,
            "vocabulary": torch.tensor(sorted(statistics.vocabulary)),
        },
        schema=_SCHEMA,
        num_prompts=statistics.num_prompts,
        fingerprint=statistics.fingerprint,
        sources=statistics.sources,
        mean_length=statistics.mean_length,
    )


def load_statistics(path: Path) -> Statistics:
    """Reads what `save_statistics` wrote.

    Args:
        path: File, or the run folder that holds it.

    Raises:
        CorruptArtifactError: The file is damaged, or something else.
        UserError: It is a pickle, such as the published code saves.
    """
    path = path / FILE if path.is_dir() else path
    if path.suffix in _PICKLES:
        raise UserError(
            f"{printable(path, 300)} is a pickle, as the published code saves its statistics; import it with: "
            "nemo-localize statistics MODEL `import` FILE"
        )
    found = artifact.load(path, schema=_SCHEMA)
    try:
        return Statistics(
            num_prompts=int(found.fields["num_prompts"]),
            mean=found.tensors["mean"],
            var=found.tensors["var"],
            fingerprint=str(found.fields["fingerprint"]),
            sources=tuple((str(name), int(count)) for name, count in found.fields["sources"]),
            mean_length=float(found.fields["mean_length"]),
            vocabulary=frozenset(found.tensors["vocabulary"].long().tolist()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(f"{path} lacks parts of its statistics ({error}); collect them again") from error
