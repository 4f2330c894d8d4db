"""Load settings from a YAML file, an optional `base:` file per file, and `key=value` overrides.

Interpolation, import by string and use of the environment are not supported, so values mean exactly their text. The
result is a frozen record and the origin of every value.
"""

import copy
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vjepa_data.settings import BadInput

S = TypeVar("S", bound=BaseModel)

EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "a group of settings"),
    "string_type": "a text",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "a text that fits {pattern}",
    "union_tag_invalid": "one of {expected_tags}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "invalid_key": "a name",
}
"""Expected values in our words, by pydantic's type of error."""

DEFAULT, COMMAND_LINE = "default", "command line"


@dataclass(frozen=True)
class Variants:
    """Metadata of a field whose settings class is chosen at run time: the classes that it may hold."""

    classes: Callable[[], Iterable[type[BaseModel]]]


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """Settings, and the origin of each value: a file name, `command line` or `default` by dotted name."""

    settings: S
    origins: dict[str, str]


def load_settings(kind: type[S], path: Path | None, overrides: Sequence[str] = ()) -> Loaded[S]:
    """Read settings from a file and overrides, and reject unknown names and invalid values.

    Args:
        kind: class of the settings, a frozen pydantic model that forbids extra keys.
        path: a YAML file, or None to use only defaults and overrides. Paths in it, which the class names in
            `file_paths`, count from its folder if they exist there.
        overrides: `dotted.name=value` with a YAML value. A number selects a list entry (`masks.0.blocks=4`).

    Raises:
        BadInput: the file is missing or not a YAML mapping, or a setting is unknown, missing or out of range. The
            message has a line per setting, with its file and the nearest known name.
    """
    renamed: Mapping[str, str] = getattr(kind, "renamed", {})
    places: Sequence[str] = getattr(kind, "file_paths", ())
    values, origins = _read(path, (), renamed, places) if path else ({}, {})
    for override in overrides:
        _override(values, origins, override, renamed)
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        # Unknown names first: they are often the reason that other names are missing. pydantic also reports a list with
        # invalid items as empty.
        details = [detail for detail in error.errors() if not (detail["type"] == "too_short" and detail["input"])]
        details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
        lines = [_explain(kind, values, origins, str(path or COMMAND_LINE), detail) for detail in details]
        raise BadInput("\n".join(lines)) from None
    return Loaded(settings, {name: _origin(name, origins) for name, _ in flatten(settings)})


def find_file(given: str | Path, shipped: Sequence[Path]) -> Path:
    """Return a YAML file given as a path or as the name of a file that ships with the project.

    Raises:
        BadInput: the name is neither a file nor that of a shipped file.
    """
    path, known = Path(given), {file.stem: file for file in shipped}
    if path.is_file() or path.name != str(given):
        return path
    if path.name not in known:
        near = difflib.get_close_matches(path.name, known, n=1)
        meant = f". Did you mean {near[0]}?" if near else ""
        raise BadInput(f"{given} is neither a file nor one of the shipped {', '.join(known)}{meant}")
    return known[path.name]


def dump_settings(settings: BaseModel) -> str:
    """Return YAML text from which `load_settings` restores the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=110)


def flatten(settings: BaseModel) -> Iterator[tuple[str, Any]]:
    """Yield every value of a tree of settings with its dotted name, in the order of the fields."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, BaseModel):
            for field in type(value).model_fields:
                yield from walk(f"{name}.{field}" if name else field, getattr(value, field))
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(value):
                yield from walk(f"{name}.{number}", item)
        else:
            yield name, value

    yield from walk("", settings)


def one_line(value: Any) -> str:
    """Format a value as YAML on one line, as it is written after `name=`."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


class _Strict(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys, of which plain YAML silently keeps the last.

    `off`, `on`, `no` and `yes` are strings, as in YAML 1.2. Otherwise `track.wandb=off` would be `False`.
    """


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            mark = node.value[position][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", mark)
    return loader.construct_mapping(node, deep=True)


BOOLEAN = "tag:yaml.org,2002:bool"
_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Strict.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != BOOLEAN]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Strict.add_implicit_resolver(BOOLEAN, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Strict)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{where}: invalid YAML: {error.problem}{position}; correct the file or value") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: invalid YAML: {' '.join(str(error).split())}") from None


def _read(
    path: Path, seen: tuple[Path, ...], renamed: Mapping[str, str], places: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the merged values of a file and its bases, and the file of each value."""
    if path.resolve() in seen:
        raise BadInput(f"{path}: the file is its own base; remove a `base:` line")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise BadInput(f"{path}: cannot be read ({reason}); give the path of a YAML file") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected `name: value` lines, got {type(values).__name__}")
    base = values.pop("base", None)
    if not isinstance(base, str | None):
        raise BadInput(f"{path}: base: expected the path of a YAML file, got {base!r}")
    merged, origins = _read(path.parent / base, (*seen, path.resolve()), renamed, places) if base else ({}, {})
    values = move_renamed(values, renamed)
    for place in places:
        _find_beside(values, place.split("."), path.parent)
    _merge(merged, values, origins, str(path), "")
    return merged, origins


def _find_beside(values: Any, names: Sequence[str], folder: Path) -> None:
    """Make a relative path absolute if it exists below the folder of the file that names it.

    Other relative paths keep counting from the working directory, as all did before.
    """
    name, *rest = names
    if name == "*":
        for item in values if isinstance(values, list) else ():
            _find_beside(item, rest, folder)
        return
    value = values.get(name) if isinstance(values, dict) else None
    if rest:
        _find_beside(value, rest, folder)
    elif isinstance(value, str) and "://" not in value and os.path.exists(beside := folder / value):
        is_same = os.path.exists(value) and os.path.samefile(value, beside)
        values[name] = value if is_same else os.path.abspath(beside)


def move_renamed(values: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the values with old names of settings replaced by new names. A value under the new name wins.

    Args:
        values: a tree of settings, as read from YAML.
        renamed: old dotted name to new dotted name.
    """
    for old, new in renamed.items():
        (*parents, last), (*targets, name) = old.split("."), new.split(".")
        group: Any = values
        for parent in parents:
            group = group.get(parent) if isinstance(group, dict) else None
        if not isinstance(group, dict) or last not in group:
            continue
        values = copy.deepcopy(values)
        group = functools.reduce(dict.__getitem__, parents, values)
        value = group.pop(last)
        into = values
        for target in targets:
            if isinstance(into.get(target), str):
                into[target] = {"name": into[target]}  # an abbreviated group
            into = into.setdefault(target, {})
        into.setdefault(name, value)
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any], origins: dict[str, str], where: str, prefix: str) -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            into[key] = into[key] if isinstance(into.get(key), dict) else {}
            _merge(into[key], value, origins, where, f"{name}.")
        else:
            into[key] = value
            _remember(origins, name, where)


def _remember(origins: dict[str, str], name: str, where: str) -> None:
    """Record the origin of a value, which replaces any origin of the value and of values inside it."""
    for old in [origin for origin in origins if origin.startswith(f"{name}.")]:
        del origins[old]
    origins[name] = where


def _override(values: dict[str, Any], origins: dict[str, str], override: str, renamed: Mapping[str, str]) -> None:
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise BadInput(f"{override!r} is not a setting; write name=value, for example optim.lr=3e-4")
    for old, new in renamed.items():
        if name == old or name.startswith(f"{old}."):
            name = new + name.removeprefix(old)
    at: Any = values
    *parents, last = name.split(".")
    for depth, part in enumerate(parents):
        if isinstance(at, list):
            at = at[_position(at, part, override)]
            continue
        if not isinstance(at.get(part), (dict, list)):
            # A group may be abbreviated (`encoder: vit_tiny`). An override inside it keeps that name.
            at[part] = {"name": at[part]} if isinstance(at.get(part), str) else {}
            origins.pop(".".join(parents[: depth + 1]), None)
        at = at[part]
    value = _parse(text, name)
    if isinstance(at, list):
        at[_position(at, last, override)] = value
    else:
        at[last] = value
    _remember(origins, name, COMMAND_LINE)


def _position(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise BadInput(f"{override!r}: {part!r} is not an entry of the list; give 0 to {len(items) - 1}")
    return int(part)


def _origin(name: str, origins: Mapping[str, str]) -> str:
    """Return the origin of a value, or of the nearest group above it that was given as a whole."""
    while name:
        if name in origins:
            return origins[name]
        name = name.rpartition(".")[0]
    return DEFAULT


def _explain(
    kind: type[BaseModel], values: Mapping[str, Any], origins: Mapping[str, str], where: str, detail: Any
) -> str:
    """Describe an error in a line: the file, the setting, the problem and the remedy."""
    name = _name_of(values, detail["loc"])
    if detail["type"].startswith("union_tag"):
        name += f".{detail['ctx']['discriminator'][1:-1]}"
    origin = _origin(name, origins)
    where = where if origin == DEFAULT else origin
    if detail["type"] == "extra_forbidden":
        near = _nearest(name, list(names(kind)))
        return f"{where}: {name} is not a setting.{f' Did you mean {near}?' if near else ''}"
    if detail["type"] in ("missing", "union_tag_not_found"):
        return f"{where}: {name} is missing; add it to the file or give {name}=VALUE"
    message, got = str(detail["msg"]).removeprefix("Value error, "), repr(detail["input"])
    if detail["type"] == "union_tag_invalid":
        got = repr(detail["ctx"]["tag"])
    if detail["type"] in EXPECTED:
        message = f"expected {EXPECTED[detail['type']].format(**detail.get('ctx', {}))}"
    elif isinstance(detail["input"], (dict, BaseModel)) or got in message:
        got = ""
    return f"{where}: {f'{name}: ' if name else ''}{message}{f', got {got}' if got else ''}"


def _name_of(values: Any, location: Sequence[str | int]) -> str:
    """Return a dotted name without the tags that pydantic inserts for branches of a union."""
    parts: list[str] = []
    for position, part in enumerate(location):
        inside = (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int))
        if inside:
            values = typing.cast(Any, values)[part]
        if inside or position == len(location) - 1:
            parts.append(str(part))
    return ".".join(parts)


def _nearest(name: str, known: Sequence[str]) -> str | None:
    pattern = re.sub(r"\.\d+", ".*", name)
    group, _, last = pattern.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == group]
    near = difflib.get_close_matches(last, [other.rpartition(".")[2] for other in siblings], n=1, cutoff=0.6)
    if near:
        return ".".join([*name.split(".")[:-1], near[0]])
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    elsewhere = elsewhere or difflib.get_close_matches(pattern, known, 1)
    return elsewhere[0] if elsewhere else None


def names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting and group of a class. `*` stands for a position in a list."""
    for field, info in kind.model_fields.items():
        yield f"{prefix}{field}"
        chosen = [(model, False) for item in info.metadata if isinstance(item, Variants) for model in item.classes()]
        for model, is_list in chosen or _models(info.annotation):
            yield from names(model, f"{prefix}{field}.{'*.' if is_list else ''}")


def _models(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_list
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple, list):
        for inner in typing.get_args(annotation):
            yield from _models(inner, is_list or origin in (tuple, list))
