"""Declare commands as typed functions, and read the words of a command line.

    @verb("verify", example="verify corpus --deep")
    def verify(path: str, /, *, deep: bool = False, workers: Workers = None) -> int:
        \"""Check a corpus against its manifest.

        Args:
            path: folder or address of a corpus.
            deep: decode every clip as well.
        \"""

Parameters before `/` are positional, all other parameters are options. Their help is the docstring. A function with a
parameter `settings: Settings` also takes settings (name=value), anywhere after the verb. It returns an exit code, or
None for 0.
Import heavy modules inside the function, so that other verbs start without them.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from cyclopts import (
    App,
    ArgumentCollection,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    Token,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
    validators,
)

from vjepa.version import __version__

SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)

Function = TypeVar("Function", bound=Callable[..., Any])

next_in_help = itertools.count().__next__
"""Sort key that lists commands in the order of their declaration."""

SETTINGS_HINT = "Settings: name=value, anywhere after the verb.\n\n"

APP = App(
    name="vjepa",
    help="Turn raw video into a pretrained video world model.",
    help_epilogue="Run `vjepa VERB --help` for the options of a verb. Write settings as name=value: "
    "`vjepa train demo optim.lr=1e-3`.\n\nExit codes: 0 done, 1 failed, 2 bad settings or input, "
    "75 saved and stopped; requeue to resume.",
    usage="Usage: vjepa VERB THING [--options] [name=value ...]",
    version=f"vjepa-pretrain {__version__}",
    help_format="plaintext",
    # No `--no-...` options, and of an option given twice the last value counts.
    default_parameter=Parameter(negative=(), allow_repeating=True),
)


def verb(name: str, *, example: str) -> Callable[[Function], Function]:
    """Declare a function as a command.

    Args:
        name: the verb, or a group and a verb: "runs list".
        example: words of a typical call, shown at the end of the help.
    """
    *group, last = name.split()

    def register(function: Function) -> Function:
        takes_settings = "settings" in signature(function).parameters
        hint = SETTINGS_HINT if takes_settings else ""
        parent = APP[group[0]] if group else APP
        parent.command(
            function,
            name=last,
            help_epilogue=f"{hint}Example: vjepa {example}",
            sort_key=next_in_help(),
            version_flags=(),
        )
        return function

    return register


def verb_group(name: str, text: str) -> App:
    """Declare a verb that is followed by another, such as `vjepa runs list`."""
    group = App(name=name, help=text, help_epilogue="", sort_key=next_in_help(), version_flags=())
    APP.command(group)
    return group


class CommandLineError(Exception):
    """A command line that cannot be run. The text is a single line for the user."""


def read_command(words: Sequence[str]) -> tuple[str, Callable[[], int | None] | None]:
    """Find the verb of a command line and convert its words to arguments.

    Returns:
        The words that name the verb, such as `vjepa runs list`, and a function that runs it. The function is None if
        the verb is incomplete.

    Raises:
        CommandLineError: an unknown verb or option, a missing or invalid value.
    """
    chain, apps, rest = APP.parse_commands(list(words))
    app, names = apps[-1], [word for word in chain if not word.startswith("-")]
    prog = " ".join(["vjepa", *names])
    settings: list[str] = []
    takes_settings = app.default_command is not None and "settings" in signature(app.default_command).parameters
    if app.default_command is not None:
        if takes_settings:
            rest, settings = split_settings(rest, app.assemble_argument_collection())
    elif rest:
        kind = "option" if rest[0].startswith("-") else "command"
        known = [name for name in app if name.startswith("-") == rest[0].startswith("-")]
        hint = did_you_mean(rest[0], known) or f"; see `{prog} --help`"
        raise CommandLineError(f"{prog}: unknown {kind} {rest[0]!r}{hint}")
    elif len(names) == len(chain):
        return prog, None
    try:
        function, arguments, unparsed = APP.parse_args([*chain, *rest], print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise CommandLineError(f"{prog}: {explain(error, prog, takes_settings)}") from None
    extra = {"settings": settings} if "settings" in unparsed else {}
    return prog, functools.partial(function, *arguments.args, **arguments.kwargs, **extra)


def split_settings(words: Sequence[str], options: ArgumentCollection) -> tuple[list[str], list[str]]:
    """Separate settings (name=value) from the other words.

    A word that is the name of an existing file, or the value of the option before it, is not a setting.
    """
    takes_value = {name for option in options if option.token_count() != (0, False) for name in option.names}
    rest, settings = [], []
    for before, word in pairwise(["", *words]):
        is_setting = SETTING.fullmatch(word) and before not in takes_value and not Path(word).exists()
        (settings if is_setting else rest).append(word)
    return rest, settings


def explain(error: CycloptsError, prog: str, takes_settings: bool) -> str:
    """Describe a parse error in a line: the problem, the words given, the remedy."""
    see_help = f"; see `{prog} --help`"
    name = error.argument.name if error.argument else ""
    match error:
        case UnknownOptionError():
            word = error.token.keyword or error.token.value
            known = [name for option in error.argument_collection if option.parse for name in option.names]
            return f"unknown option {word!r}{did_you_mean(word, [*known, '--help']) or see_help}"
        case UnusedCliTokensError(unused_tokens=[word, *_]):
            hint = "; this verb takes no settings" if SETTING.fullmatch(word) else see_help
            return f"unexpected argument {word!r}{'; write settings as name=value' if takes_settings else hint}"
        case MissingArgumentError():
            return f"{error.keyword} needs a value" if error.keyword else f"{name} is missing{see_help}"
        case CoercionError(msg=None, token=token, target_type=kind) if token is not None:
            expected = f"one of {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else "a number"
            return f"{name}: {token.value!r} is not {expected}"
        case ValidationError(argument=argument) if argument is not None:
            return f"{name}: {argument.value} {error.exception_message.lower().rstrip('.')}"
        case CoercionError():
            return f"{name}: {error.msg}"
    return str(error)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return the question that follows a misspelt word, or an empty string."""
    near = difflib.get_close_matches(word, known, n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def whole_number(least: int) -> Parameter:
    """Convert the words of an option to whole numbers from `least`. By default cyclopts would round 2.7 to 3."""

    def convert(kind: Any, tokens: Sequence[Token]) -> int | tuple[int, ...]:
        for token in tokens:
            if not token.value.isdecimal() or int(token.value) < least:
                raise ValueError(f"{token.value!r} is not a whole number of at least {least}")
        numbers = tuple(int(token.value) for token in tokens)
        return numbers if get_origin(kind) is tuple else numbers[-1]

    return Parameter(converter=convert)


Settings = Annotated[Sequence[str], Parameter(parse=False)]
Count = Annotated[int, whole_number(1)]
Number = Annotated[int, whole_number(0)]
Amount = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Several = Parameter(consume_multiple=True)
"""For an option that is followed by several values."""

Config = Annotated[str, Parameter(help="A YAML file, or the name of a file that ships with the project.")]
Overwrite = Annotated[bool, Parameter(help="Replace an earlier result.")]
Workers = Annotated[int | None, whole_number(1), Parameter(help="Processes. By default as many as cores.")]
Part = Annotated[
    Literal["target", "encoder"],
    Parameter(help="Weights to use: the moving average (target), or the trained weights (encoder)."),
]
