"""How a verb is declared."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Function = Callable[[argparse.Namespace], int | None]


@dataclass(frozen=True)
class Verbs:
    """Where verbs are added."""

    parsers: Any

    def add(self, name: str, function: Function, text: str, *, settings: bool = False) -> argparse.ArgumentParser:
        """A verb that calls a function with its arguments; with `settings`, key=value words are its `overrides`."""
        parser = self.parsers.add_parser(name, help=text, description=text)
        parser.set_defaults(function=function, takes_settings=settings)
        return parser

    def group(self, name: str, text: str) -> "Verbs":
        """A verb that is followed by another (`vjepa runs list`)."""
        parser = self.parsers.add_parser(name, help=text, description=text)
        return Verbs(parser.add_subparsers(dest="part", required=True, metavar="WHAT"))


def config(parser: argparse.ArgumentParser) -> None:
    """The run file that a verb is about."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that ships with the project")


def workers(parser: argparse.ArgumentParser) -> None:
    """How many processes a verb may use."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: one per core, %(default)s)")


def out(parser: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    """Where a verb writes."""
    parser.add_argument("--out", type=Path, required=required, help=text)


def overwrite(parser: argparse.ArgumentParser) -> None:
    """Leave to replace an earlier result."""
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
