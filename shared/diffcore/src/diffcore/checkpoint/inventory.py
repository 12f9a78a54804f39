"""The result of checking a model folder or file: plain values, complete enough to plan loading from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from diffcore.checkpoint.added_tokens import Added
from diffcore.checkpoint.catalog import Role
from diffcore.io.tensorfile import TensorHeader


@dataclass(frozen=True)
class Component:
    """One part of a model, as its files describe it.

    Attributes:
        name: The component's key in the pipeline; "backbone" or "scheduler" without a pipeline.
        role: Its purpose in the model, such as "backbone" or "text_encoder".
        library: The library that defines the class.
        class_name: Name of its class in that library.
        config: The settings that the library may see.
        folder: The folder with its files.
        weights: Checked headers of its weight files.
        files: Vocabulary files of a tokenizer; empty for others.
        variant: Variant of the weight files, such as "fp16".
        pickles: Weight files that would have to be unpickled; empty unless that was allowed.
        dropped: Number of settings that are withheld from the library.
        added: Tokens that were added to a tokenizer's own.
    """

    name: str
    role: Role
    library: str
    class_name: str
    config: Mapping[str, Any]
    folder: Path
    weights: tuple[TensorHeader, ...] = ()
    files: tuple[Path, ...] = ()
    variant: str | None = None
    pickles: tuple[Path, ...] = ()
    dropped: int = 0
    added: tuple[Added, ...] = ()

    def with_weights(
        self, weights: Sequence[TensorHeader], pickles: Sequence[Path], variant: str | None
    ) -> "Component":
        """Returns the component with its weight files."""
        return replace(self, weights=tuple(weights), pickles=tuple(pickles), variant=variant)


@dataclass(frozen=True)
class Inventory:
    """The checked content of a model folder or file.

    Attributes:
        path: The folder or file that was inspected.
        layout: Kind of layout: a pipeline folder, the folder of one component, a single file, or a pickle.
        class_name: Pipeline class, backbone class, or the family of a single file.
        components: Parts by name; a single file has none before its family's configurations join it.
        header: Header of a single file; None for folders and pickles.
        settings: Scalars of the pipeline, or of EDM preconditioning.
        warnings: Sentences that the user should read before loading.
    """

    path: Path
    layout: Literal["pipeline", "component", "single_file", "pickle"]
    class_name: str
    components: Mapping[str, Component]
    header: TensorHeader | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """Headers of all weight files."""
        own = () if self.header is None else (self.header,)
        return own + tuple(header for component in self.components.values() for header in component.weights)

    @property
    def num_bytes(self) -> int:
        """Total size of all weight files in bytes."""
        return sum(header.size for header in self.headers)

    @property
    def num_tensors(self) -> int:
        """Number of tensors in all weight files."""
        return sum(len(header.tensors) for header in self.headers)
