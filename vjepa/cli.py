"""The verbs: `vjepa VERB THING [--options] [key=value ...]`.

Each verb imports what it needs only when it is called, so that `vjepa show` answers at once and `vjepa launch` works
on a login node. Exit codes: 0 done, 1 failed, 2 bad settings or input, 75 stopped in good order and wishing to go on.
"""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import vjepa
from vjepa_data.settings import BadInput as BadData
from vjepa_launch.settings import BadInput as BadLaunch

SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args([word for word in words if not SETTING.fullmatch(word)])
    args.overrides = [word for word in words if SETTING.fullmatch(word)]
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        if args.overrides and not args.takes_settings:
            raise BadData(f"{args.overrides[0]!r}: `vjepa {args.verb}` takes no settings")
        return args.verb_function(args) or 0
    except (BadData, BadLaunch) as error:
        print(f"vjepa {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vjepa {args.verb}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def show(args: argparse.Namespace) -> None:
    from vjepa.config import load
    from vjepa_data.settings_files import flatten

    loaded = load(args.config, args.overrides)
    rows = [(name, str(value), loaded.origins[name]) for name, value in flatten(loaded.settings)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        print(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}")


def train(args: argparse.Namespace) -> int:
    from vjepa.config import load
    from vjepa.train import train

    run = load(args.config, args.overrides).settings
    return train(run, args.out or Path("runs") / run.name)


def synthesize(args: argparse.Namespace) -> None:
    from vjepa_data.synthetic import write_corpus

    write_corpus(args.out, videos=args.videos, seed=args.seed)


def demo(args: argparse.Namespace) -> int:
    from vjepa.demo import demo

    return demo(args.out, videos=args.videos, overrides=args.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vjepa",
        description="Raw video in, a pretrained video world model out.",
        epilog="Settings are given as key=value after the verb: `vjepa train configs/demo.yaml optim.lr=1e-3`.",
    )
    parser.add_argument("--version", action="version", version=f"vjepa-pretrain {vjepa.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function: Callable[[argparse.Namespace], int | None], text: str, *, settings: bool = False):
        one = verbs.add_parser(function.__name__, help=text, description=text)
        one.set_defaults(verb_function=function, takes_settings=settings)
        return one

    def config(one: argparse.ArgumentParser) -> None:
        one.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that ships with the project")

    one = verb(demo, "the whole path on this machine, in minutes", settings=True)
    one.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to work in (default: %(default)s)")
    one.add_argument("--videos", type=Path, help="folder of your own videos, in place of generated physics scenes")

    one = verb(synthesize, "write a corpus of generated physics scenes as labelled mp4 files")
    one.add_argument("--out", type=Path, required=True, help="folder for the videos and their labels")
    one.add_argument("--videos", type=int, default=400, help="how many (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0)

    config(verb(show, "resolved settings, and where each came from", settings=True))

    one = verb(train, "train in this process, or in any number of them under torchrun", settings=True)
    config(one)
    one.add_argument("--out", type=Path, help="run folder (default: runs/NAME); one that exists is continued")
    return parser
