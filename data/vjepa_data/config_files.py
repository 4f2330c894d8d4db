"""Settings from files: one YAML file, at most one `base:` each, `key=value` overrides, nothing else.

No interpolation, no import by string, no environment: what a file says is what it means. The result is a frozen
record and, for every value, where it came from.
"""

import copy
import difflib
import functools
import math
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
"""What stands in place of pydantic's words, by its type of error."""

DEFAULT, COMMAND_LINE = "default", "command line"


@dataclass(frozen=True)
class Variants:
    """Metadata of a field whose settings class is chosen at run time: the classes that it may hold."""

    classes: Callable[[], Iterable[type[BaseModel]]]


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """Settings, and the origin of each: dotted name to file name, `command line` or `default`."""

    settings: S
    origins: dict[str, str]


def load_settings(kind: type[S], path: Path | None, overrides: Sequence[str] = ()) -> Loaded[S]:
    """Read settings from a file and overrides, and refuse what is not known or does not fit.

    Args:
        kind: the settings to read; a frozen pydantic model that forbids extra keys.
        path: a YAML file, or None for defaults and overrides alone.
        overrides: `dotted.name=value`, the value in YAML; a number steps into a list (`masks.0.blocks=4`).

    Raises:
        BadInput: the file is missing or no YAML mapping, or a setting is unknown, missing or out of range;
            one line for each, with the file and the nearest known name.
    """
    renamed: Mapping[str, str] = getattr(kind, "renamed", {})
    values, origins = _read(path, (), renamed) if path else ({}, {})
    for override in overrides:
        _override(values, origins, override, renamed)
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        # Unknown names first: they are often the reason that others are missing. A list whose items are wrong is
        # also reported as empty, which it is not.
        details = [one for one in error.errors() if not (one["type"] == "too_short" and one["input"])]
        details.sort(key=lambda one: one["type"] != "extra_forbidden")
        lines = [_explain(kind, values, origins, str(path or COMMAND_LINE), detail) for detail in details]
        raise BadInput("\n".join(lines)) from None
    return Loaded(settings, {name: _origin(name, origins) for name, _ in flatten(settings)})


def find_file(given: str | Path, shipped: Sequence[Path]) -> Path:
    """The YAML file that is meant: a path, or the name of a file that ships with the project.

    Raises:
        BadInput: it is a mere name, and neither a file here nor one of the shipped.
    """
    path, known = Path(given), {one.stem: one for one in shipped}
    if path.is_file() or path.name != str(given):
        return path
    if path.name not in known:
        near = difflib.get_close_matches(path.name, known, n=1)
        meant = f". Did you mean {near[0]}?" if near else ""
        raise BadInput(f"{given} is neither a file nor one of the shipped {', '.join(known)}{meant}")
    return known[path.name]


def dump_settings(settings: BaseModel) -> str:
    """The YAML text from which `load_settings` makes the same settings again."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=110)


def flatten(settings: BaseModel) -> Iterator[tuple[str, Any]]:
    """Every single value of a tree of settings with its dotted name, in the order of the fields."""

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
    """A single value as YAML, such as may stand after `name=`."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


class _Strict(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which plain YAML silently keeps the last, and in which `off`, `on`, `no`
    and `yes` are words, as in YAML 1.2: `track.wandb=off` would otherwise be `False`."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for place, key in enumerate(keys):
        if key in keys[:place]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} is given twice", node.value[place][0].start_mark
            )
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
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{where}: not YAML: {error.problem}{place}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _read(path: Path, seen: tuple[Path, ...], renamed: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged values of a file and its bases, and the file that each leaf came from."""
    if path.resolve() in seen:
        raise BadInput(f"{path}: is its own base; remove one `base:` line")
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
    merged, origins = _read(path.parent / base, (*seen, path.resolve()), renamed) if base else ({}, {})
    _merge(merged, move_renamed(values, renamed), origins, str(path), "")
    return merged, origins


def move_renamed(values: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the values with settings that have old names under their new ones; a value under the new name wins.

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
    """Note where a value came from, in place of whatever was known of it and of what lies inside it."""
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
            # A group may be abbreviated (`encoder: vit_tiny`); an override inside it keeps the abbreviation's name.
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
        raise BadInput(f"{override!r}: {part!r} is not one of the {len(items)} entries (0 to {len(items) - 1})")
    return int(part)


def _origin(name: str, origins: Mapping[str, str]) -> str:
    """The origin of a value: its own, or that of the nearest group above it that was given as a whole."""
    while name:
        if name in origins:
            return origins[name]
        name = name.rpartition(".")[0]
    return DEFAULT


def _explain(
    kind: type[BaseModel], values: Mapping[str, Any], origins: Mapping[str, str], where: str, detail: Any
) -> str:
    """One line for one error: the file, the setting, what is wrong and what to do."""
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
    """A dotted name without the tags that pydantic puts in for the branches of a union."""
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
    siblings = [one for one in known if one.rpartition(".")[0] == group]
    near = difflib.get_close_matches(last, [one.rpartition(".")[2] for one in siblings], n=1, cutoff=0.6)
    if near:
        return ".".join([*name.split(".")[:-1], near[0]])
    elsewhere = [one for one in known if one.rpartition(".")[2] == last] or difflib.get_close_matches(pattern, known, 1)
    return elsewhere[0] if elsewhere else None


def names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting and group of a kind; `*` stands for a position in a list."""
    for field, info in kind.model_fields.items():
        yield f"{prefix}{field}"
        chosen = [(model, False) for each in info.metadata if isinstance(each, Variants) for model in each.classes()]
        for model, is_list in chosen or _models(info.annotation):
            yield from names(model, f"{prefix}{field}.{'*.' if is_list else ''}")


def _models(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_list
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple, list):
        for inner in typing.get_args(annotation):
            yield from _models(inner, is_list or origin in (tuple, list))
