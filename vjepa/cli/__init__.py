"""The verbs: `vjepa VERB THING [--options] [key=value ...]`.

One file for each kind of person: `datasets` for those who build corpora, `runs` for those who train, `models` for those
who use what came out. Each verb imports what it needs only when it is called, so that `vjepa show` answers at once and
`vjepa launch` works on a login node. Exit codes: 0 done, 1 failed, 2 bad settings or input, 75 stopped in good order
and wishing to go on.
"""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Sequence

import vjepa
from vjepa.cli import datasets, models, runs
from vjepa.cli.verb import Verbs
from vjepa_data.settings import BadInput as BadData
from vjepa_launch.settings import BadInput as BadLaunch

SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args([word for word in words if not SETTING.fullmatch(word)])
    args.overrides = [word for word in words if SETTING.fullmatch(word)]
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        if args.overrides and not args.takes_settings:
            raise BadData(f"{args.overrides[0]!r}: this verb takes no settings")
        return args.function(args) or 0
    except (BadData, BadLaunch) as error:
        print(f"vjepa {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vjepa {args.verb}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    whole = argparse.ArgumentParser(
        prog="vjepa",
        description="Raw video in, a pretrained video world model out.",
        epilog="Settings are given as key=value after the verb: `vjepa train demo optim.lr=1e-3`.",
    )
    whole.add_argument("--version", action="version", version=f"vjepa-pretrain {vjepa.__version__}")
    verbs = Verbs(whole.add_subparsers(dest="verb", required=True, metavar="VERB"))
    for room in (runs, datasets, models):
        room.add_verbs(verbs)
    return whole
