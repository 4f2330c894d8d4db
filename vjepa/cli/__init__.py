"""The verbs: `vjepa VERB THING [--options] [key=value ...]`.

One file for each kind of person: `datasets` for those who build corpora, `runs` for those who train, `models` for those
who use what came out. Each verb imports what it needs only when it is called, so that `vjepa show` answers at once and
`vjepa launch` works on a login node. Exit codes: 0 done, 1 failed, 2 bad settings or input, 75 stopped in good order
and wishing to go on.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence

from vjepa.cli import datasets, models, runs
from vjepa.cli.verb import Parser, Verbs, nearest
from vjepa.version import __version__
from vjepa_data.settings import BadInput as BadData
from vjepa_launch.settings import BadInput as BadLaunch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MENDABLE = {
    **dict.fromkeys(FULL, "make room, then run it again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give another place, or the right to write there"),
    **dict.fromkeys((errno.ENOTDIR, errno.ENAMETOOLONG), "give another place"),
}
"""What a disk may object to, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    whole, verbs = parsers()
    if not words:
        whole.print_help(sys.stderr)
        return 2
    if not words[0].startswith("-") and words[0] not in verbs.names:
        whole.error(f"{words[0]} is no verb{nearest(words[0], verbs.names) or '; see `vjepa --help`'}")
    args = whole.parse_args(words)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        code = args.function(args) or 0
        sys.stdout.flush()
        return code
    except (BadData, BadLaunch) as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read what we print has seen enough: `vjepa show demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{args.prog}: {where}{error.strerror}; {MENDABLE[error.errno]}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def parsers() -> tuple[Parser, Verbs]:
    """The parser of the whole line, and the verbs in it with their options."""
    whole = Parser(
        prog="vjepa",
        description="Raw video in, a pretrained video world model out.",
        epilog="`vjepa VERB --help` says more. Settings are given as name=value: `vjepa train demo optim.lr=1e-3`.",
    )
    whole.add_argument("--version", action="version", version=f"vjepa-pretrain {__version__}")
    verbs = Verbs(whole.add_subparsers(dest="verb", required=True, metavar="VERB"))
    for room in (runs, datasets, models):
        room.add_verbs(verbs)
    return whole, verbs
