"""Options from a YAML file, under the command line: what `--config` reads."""

from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from diffcore.errors import UserError, printable
from diffcore.io import files

_BYTES, _ALIASES, _DEPTH = 10_000_000, 100, 64


class _UniqueLoader(yaml.SafeLoader):
    """The safe YAML loader, which runs no code, made to refuse keys that are given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value) and not any(key.value == "<<" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return mapping


def apply(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills options that the command line left open from the file that `--config` names; cyclopts calls this.

    Raises:
        UserError: The file cannot be read, is not a YAML mapping, or has a key that is no option; the message names
            the nearest one.
    """
    named = next((a for a in arguments if a.name == "--config" and a.tokens), None)
    if named is None:
        return
    path = Path(named.tokens[-1].value)
    options = read(path)
    known = {name.removeprefix("--").replace("-", "_") for a in arguments for name in a.names if name.startswith("--")}
    for name in options:
        if name.replace("-", "_") not in known:
            near = get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "see --help for those it has"
            raise UserError(f"{printable(path, 300)} sets {printable(name)!r}, no option of this command; {hint}")
    # Below the command's name: of a flat mapping cyclopts drops options that are called like another command.
    named_options = reduce(lambda inner, command: {command: inner}, reversed(commands), options)
    Dict(named_options, source=printable(path, 300))(app, commands, arguments)


def read(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping with the safe loader.

    Raises:
        UserError: The file cannot be read, is no mapping, gives a key twice, or is larger than any settings are.
    """
    shown = printable(path, 300)
    with files.explained(path, reading=True):
        data = files.read(path)
    if len(data) > _BYTES:
        raise UserError(f"{shown} has {len(data):,} bytes, too many for settings; give a config.yaml")
    try:
        text = data.decode("utf-8-sig")
        _limit(shown, text)
        value = yaml.load(text, Loader=_UniqueLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{shown} is not valid YAML: {printable(error, 200)}; correct it and try again") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{shown} holds no options; write one 'name: value' per line")
    return {str(name): item for name, item in value.items()}


def _limit(shown: str, text: str) -> None:
    """Refuses YAML with too many aliases or too much nesting, which would take long to read."""
    aliases = depth = 0
    for event in yaml.parse(text):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > _ALIASES:
            raise UserError(f"{shown} repeats itself by more than {_ALIASES} aliases; write the values out")
        if depth > _DEPTH:
            raise UserError(f"{shown} is nested more than {_DEPTH} levels deep; options are one level")
