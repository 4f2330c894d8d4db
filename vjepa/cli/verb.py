"""How a verb is declared."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

Function = Callable[[argparse.Namespace], int | None]

SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Options and settings (name=value) in any order; what is misspelt is answered with what was meant."""

    takes_settings: bool | None = None
    """Of a verb; None of a group of verbs."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **how)
        self._takes_value: set[str] = set()

    def add_argument(self, *names: Any, **how: Any) -> argparse.Action:
        action = super().add_argument(*names, **how)
        if action.nargs != 0:
            self._takes_value.update(action.option_strings)
        return action

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        rest, settings = self._part(list(args or ())) if self.takes_settings else (args, [])
        found, unknown = super().parse_known_args(rest, namespace or argparse.Namespace())
        if self.takes_settings is not None:
            found.overrides = settings
            if unknown:
                self._refuse(unknown)
        return found, unknown

    def _part(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Words that are no settings, and settings. A file of such a name is a file, an option's value a value."""
        rest, settings = [], []
        for before, word in pairwise(["", *words]):
            is_setting = SETTING.fullmatch(word) and before not in self._takes_value and not Path(word).exists()
            (settings if is_setting else rest).append(word)
        return rest, settings

    def _refuse(self, words: Sequence[str]) -> NoReturn:
        """End with code 2 because of words that mean nothing here."""
        first = words[0]
        if first.startswith("-"):
            options = re.findall(r"(?<![\w-])--?\w[\w-]*", self.format_help())
            self.error(f"{first} is no option of this verb{nearest(first, options)}")
        if SETTING.fullmatch(first):
            self.error(f"{first!r}: this verb takes no settings")
        self.error(
            f"{first!r} is one word too many{'; settings are written name=value' if self.takes_settings else ''}"
        )


def nearest(word: str, known: Sequence[str]) -> str:
    """The question that follows a misspelt word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f". Did you mean {near[0]}?" if near else ""


@dataclass(frozen=True)
class Verbs:
    """Where verbs are added."""

    parsers: Any

    @property
    def names(self) -> list[str]:
        return list(self.parsers.choices)

    def add(
        self, name: str, function: Function, text: str, *, example: str, settings: bool = False
    ) -> argparse.ArgumentParser:
        """A verb that calls a function with its arguments; with `settings`, name=value words are its `overrides`."""
        end = f"example:\n  vjepa {example}"
        if settings:
            end = f"settings: name=value, anywhere after the verb\n\n{end}"
        parser = self.parsers.add_parser(name, help=text, description=text, epilog=end)
        parser.set_defaults(function=function, prog=parser.prog)
        parser.takes_settings = settings
        return parser

    def group(self, name: str, text: str) -> "Verbs":
        """A verb that is followed by another (`vjepa runs list`)."""
        parser = self.parsers.add_parser(name, help=text, description=text)
        return Verbs(parser.add_subparsers(dest="part", required=True, metavar="WHAT"))


def count(text: str) -> int:
    """A number of things, at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def number(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def amount(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def config(parser: argparse.ArgumentParser) -> None:
    """The run file that a verb is about."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that ships with the project")


def workers(parser: argparse.ArgumentParser) -> None:
    """How many processes a verb may use."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=count, default=cores, metavar="N", help="processes (default: one per core, %(default)s)"
    )


def out(parser: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    """Where a verb writes."""
    parser.add_argument("--out", type=Path, required=required, metavar="PATH", help=text)


def overwrite(parser: argparse.ArgumentParser) -> None:
    """Leave to replace an earlier result."""
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
