"""The verbs: `vjepa VERB THING [--options] [key=value ...]`.

Each verb imports what it needs only when it is called, so that `vjepa show` answers at once and `vjepa launch` works
on a login node. Exit codes: 0 done, 1 failed, 2 bad settings or input, 75 stopped in good order and wishing to go on.
"""

import argparse
import logging
import os
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


def shard(args: argparse.Namespace) -> None:
    from vjepa_data.build.shard import shard
    from vjepa_data.settings_files import load_settings
    from vjepa_data.spec import Spec

    spec = load_settings(Spec, args.spec, args.overrides).settings
    manifest = shard(args.sources, args.out, spec=spec, workers=args.workers)
    totals = ", ".join(
        f"{split['samples']} clips ({split['seconds'] / 60:.1f} min) in {name}"
        for name, split in manifest.splits.items()
    )
    print(f"{args.out}: {totals}; corpus {manifest.hash[:12]}; report in {args.out / 'report.html'}")


def verify(args: argparse.Namespace) -> int:
    from vjepa_data.verify import verify

    verdict = verify(args.folder, deep=args.deep, workers=args.workers)
    for problem in verdict.problems:
        print(problem)
    decoded = f", {verdict.decoded} of them decoded" if args.deep else ""
    print(f"{args.folder}: {verdict.samples} samples{decoded}, {len(verdict.problems)} problems")
    return 1 if verdict.problems else 0


def train(args: argparse.Namespace) -> int:
    from vjepa.config import load
    from vjepa.train import train

    run = load(args.config, args.overrides).settings
    return train(run, args.out or Path("runs") / run.name)


def launch(args: argparse.Namespace) -> None:
    from vjepa.config import load
    from vjepa_data.settings_files import dump_settings, load_settings
    from vjepa_launch.settings import Cluster
    from vjepa_launch.submit import describe, launch, train_command

    settings = load(args.config, args.overrides).settings
    cluster = load_settings(Cluster, args.on).settings
    run = args.out or Path("runs") / settings.name
    how = {"config": dump_settings(settings), "name": settings.name, "nodes": args.nodes}
    if args.dry_run:
        print(describe(run, cluster, train_command(run.resolve()), **how), end="")
        return
    launched = launch(run, cluster, train_command(run.resolve()), **how)
    print(launched)


def export(args: argparse.Namespace) -> None:
    from vjepa.export import export

    export(args.source, args.out, format=args.format, part=args.part, licence=args.licence, overwrite=args.overwrite)


def eval(args: argparse.Namespace) -> None:
    from vjepa.evals.probe import probe, table

    print(table(probe(args.model, args.shards, out=args.out, split=args.split, overwrite=args.overwrite)))


def report(args: argparse.Namespace) -> None:
    from vjepa.report import report

    report(args.source, args.out, overwrite=args.overwrite)


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
    cores = len(os.sched_getaffinity(0))
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

    one = verb(shard, "raw videos to shards; may be killed and started again", settings=True)
    one.add_argument("sources", nargs="+", metavar="SOURCE", help="folders, video files, tables of videos")
    one.add_argument("--out", type=Path, required=True, help="folder for the corpus")
    one.add_argument("--spec", type=Path, help="YAML file of the build's settings; key=value after it override")
    one.add_argument("--workers", type=int, default=cores, help="processes (default: one per core, %(default)s)")

    one = verb(verify, "a corpus against its manifest")
    one.add_argument("folder", type=Path)
    one.add_argument("--deep", action="store_true", help="decode every clip as well")
    one.add_argument("--workers", type=int, default=cores, help="processes that decode (default: %(default)s)")

    one = verb(train, "train in this process, or in any number of them under torchrun", settings=True)
    config(one)
    one.add_argument("--out", type=Path, help="run folder (default: runs/NAME); one that exists is continued")

    one = verb(launch, "train on a cluster through submitit, or on this machine in the background", settings=True)
    config(one)
    one.add_argument("--on", type=Path, required=True, metavar="CLUSTER", help="profile, launch/clusters/*.yaml")
    one.add_argument("--nodes", type=int, help="machines, in place of the profile's number")
    one.add_argument("--out", type=Path, help="run folder (default: runs/NAME); one that exists is continued")
    one.add_argument("--dry-run", action="store_true", help="print what would be submitted, and touch nothing")

    one = verb(export, "a run's encoder for others to load, loaded back and compared")
    one.add_argument("source", type=Path, metavar="RUN", help="a run folder, a checkpoint, or another export")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--format", choices=("hf", "native"), default="hf")
    one.add_argument(
        "--part", choices=("target", "encoder"), default="target", help="moving average, or online weights"
    )
    one.add_argument("--licence", default="other", help="licence of the weights, for the model card")
    one.add_argument("--overwrite", action="store_true")

    one = verb(eval, "what frozen features are worth")
    one.add_argument("kind", choices=("probe",))
    one.add_argument("model", type=Path, metavar="MODEL")
    one.add_argument("shards", type=Path, metavar="SHARDS")
    one.add_argument("--split", default="val")
    one.add_argument("--out", type=Path, help="JSON file for the result")
    one.add_argument("--overwrite", action="store_true")

    one = verb(report, "one page about a run: curves, masks, clips, features, probes")
    one.add_argument("source", type=Path, metavar="RUN")
    one.add_argument("--out", type=Path, help="HTML file (default: report.html in the run folder)")
    one.add_argument("--overwrite", action="store_true")
    return parser
