"""Subjects of a command line as instances: pictures are looked at once, encoded once, and kept in the run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffcore.errors import UserError, printable
from diffcore.models import DiffusionModel
from diffcore.units import Map
from w2w_space.files.subjects import Seen, Subjects, class_of, look_at, read_pictures
from w2w_space.instance import Instance
from w2w_space.pictures import condition_of, picture_format, posterior, takes_classes

_LOOK, _ENCODE = 16, 1  # subjects whose pictures are looked at, and encoded, between two notes in the run


@dataclass(frozen=True, eq=False)
class Read:
    """Instances of a folder, and what was found in it.

    Attributes:
        instances: Subjects with their encoded pictures.
        skipped: Name and reason of each file and folder that is left out.
        notes: Sentences about conversions of pictures.
    """

    instances: tuple[Instance, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def require_classes(model: DiffusionModel, listed: Subjects, class_label: int | None) -> None:
    """Raises UserError where the class of a picture is not known to a model that draws classes.

    Args:
        model: Model that shall be trained.
        listed: Subjects of the command line.
        class_label: Class of all pictures; None where folders name it.
    """
    if class_label is not None or not takes_classes(model):
        return
    for each in listed.subjects:
        for place in each.pictures:
            name = listed.source.names[place]
            if class_of(name, listed.depth) is None:
                raise UserError(
                    f"{printable(model.name)} draws classes, and {printable(name)} lies in no folder that is named by "
                    "its class; sort pictures into folders of that number, such as 3, or give one `class_label` for all"
                )


def read_subjects(
    model: DiffusionModel,
    listed: Subjects,
    *,
    prompt: str | None,
    class_label: int | None,
    size: int | None,
    map: Map,
) -> Read:
    """Returns the subjects of a folder as instances; those without a usable picture are left out.

    Args:
        model: Model that shall be trained.
        listed: Subjects of the command line.
        prompt: Prompt of all subjects; None for models that take none.
        class_label: Class of all pictures; None where folders name it, or the model takes none.
        size: Side of the pictures in pixels; by default what the model was trained for.
        map: Map over subjects that keeps what is finished.

    Raises:
        UserError: No subject has a usable picture.
    """
    source = listed.source
    channels, side = picture_format(model, size)
    form = f"{channels}-{side}-{model.fingerprint[:12]}"

    def look(unit: list) -> list[Seen]:
        return [look_at(source, each, channels=channels, side=side) for each in unit]

    def encode(unit: list[tuple[str, tuple[int, ...], str]]) -> list[torch.Tensor]:
        return [
            posterior(model, read_pictures(source, pictures, channels=channels, side=side)) for _, pictures, _ in unit
        ]

    seen = map(look, listed.subjects, name=f"look-{channels}-{side}", kind=Seen, unit_size=_LOOK)
    kept = [each for each in seen if each.pictures]
    skipped = list(listed.skipped)
    for each in seen:
        skipped += each.skipped
        if not each.pictures:
            skipped.append((each.name, "has no picture that can be read"))
    if not kept:
        raise UserError(f"{printable(source.path, 300)} has no subject with a usable picture; {skipped[0][1]}")
    items = [(each.name, each.pictures, each.digest) for each in kept]
    moments = map(encode, items, name=f"latents-{form}", kind=torch.Tensor, unit_size=_ENCODE)
    shared = None if takes_classes(model) and class_label is None else conditions(model, prompt, class_label, size)
    instances = []
    for each, latents in zip(kept, moments, strict=True):
        told = shared
        if told is None:
            labels = [class_of(source.names[place], listed.depth) for place in each.pictures]
            told = condition_of(model, prompt=prompt, class_labels=[n for n in labels if n is not None], size=size)
        instances.append(Instance.of_posterior(each.name, latents, told))
    return Read(tuple(instances), tuple(skipped), tuple(note for each in seen for note in each.notes))


def conditions(
    model: DiffusionModel, prompt: str | None, class_label: int | None, size: int | None
) -> dict[str, torch.Tensor]:
    """Returns the condition that all subjects share, with a warning where the prompt is too long.

    Args:
        model: Model that shall be trained.
        prompt: Prompt of all subjects; None for models that take none.
        class_label: Class of all pictures; None for models that draw no classes.
        size: Side of the pictures in pixels.
    """
    labels = None if class_label is None else [class_label]
    found = condition_of(model, prompt=prompt, class_labels=labels, size=size)
    if prompt is not None and model.prompts is not None:
        require_whole(model, [prompt])
    return found


def require_whole(model: DiffusionModel, prompts: Sequence[str]) -> None:
    """Raises UserError where a text encoder would cut a prompt, which must not be silent.

    Args:
        model: Model with its prompt encoder.
        prompts: Prompts that are to be seen whole.
    """
    if model.prompts is None:
        return
    for text in model.prompts.tokenize(prompts).lost:
        if text:
            raise UserError(f"the prompt is too long: the text encoder would lose {printable(text, 100)!r}; shorten it")
