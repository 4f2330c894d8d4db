"""Verbs for those who use what came out: exports, features, probes, a report."""

import argparse
from pathlib import Path

from vjepa.cli.verb import Verbs, out, overwrite


def add_verbs(verbs: Verbs) -> None:
    """Declare them."""
    verb = verbs.add("export", export, "a model for others to load, loaded back and compared")
    verb.add_argument("source", type=Path, metavar="RUN", help="a run folder, a checkpoint, or another export")
    out(verb, "new folder")
    verb.add_argument("--format", choices=("hf", "native"), default="hf", help="(default: %(default)s)")
    _part(verb)
    verb.add_argument("--licence", default="other", help="licence of the weights, for the model card")
    overwrite(verb)

    verb = verbs.add("import", import_, "a model of others as a checkpoint to go on from")
    verb.add_argument("source", type=Path, help="a released V-JEPA 2 .pt file, or a Hugging Face folder")
    out(verb, "folder for the checkpoint, laid out as a run's")
    overwrite(verb)

    verb = verbs.add("embed", embed, "features of a folder of videos")
    verb.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint, or an export")
    verb.add_argument("videos", type=Path, nargs="+", metavar="VIDEOS", help="files and folders, or one corpus")
    out(verb, "file: .parquet, .npy or .safetensors")
    verb.add_argument("--what", choices=("clip", "time", "token"), default="clip", help="one vector for each of these")
    verb.add_argument("--split", default="train", help="of a corpus (default: %(default)s)")
    verb.add_argument("--clips-per-video", type=int, default=1)
    _part(verb)
    verb.add_argument("--device", help="(default: a GPU if there is one)")
    verb.add_argument("--batch", type=int, default=8, help="clips encoded together (default: %(default)s)")
    overwrite(verb)

    group = verbs.group("eval", "what frozen features are worth")
    verb = group.add("probe", probe, "linear readouts beside an untrained encoder, pixels and the prior")
    verb.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint, or an export")
    verb.add_argument("shards", type=Path, metavar="SHARDS", help="a corpus whose samples carry labels")
    verb.add_argument("--split", default="val", help="to report on (default: %(default)s)")
    verb.add_argument("--train-split", help="to fit on (default: two thirds of the videos of --split)")
    verb.add_argument("--labels", nargs="+", help="to read out (default: all)")
    _part(verb)
    out(verb, "JSON file for the result", required=False)
    overwrite(verb)

    verb = verbs.add("report", report, "one page about a run: curves, masks, clips, features, probes")
    verb.add_argument("source", type=Path, metavar="RUN")
    out(verb, "HTML file (default: report.html in the run folder)", required=False)
    overwrite(verb)


def _part(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--part", choices=("target", "encoder"), default="target", help="the moving average, or the online weights"
    )


def export(args: argparse.Namespace) -> None:
    from vjepa.export import export

    export(args.source, args.out, format=args.format, part=args.part, licence=args.licence, overwrite=args.overwrite)


def import_(args: argparse.Namespace) -> None:
    from vjepa.adopt import adopt

    print(adopt(args.source, args.out, overwrite=args.overwrite))


def embed(args: argparse.Namespace) -> None:
    from vjepa.evals.embed import embed

    embed(
        args.model,
        args.videos,
        args.out,
        what=args.what,
        split=args.split,
        clips_per_video=args.clips_per_video,
        part=args.part,
        device=args.device,
        batch=args.batch,
        overwrite=args.overwrite,
    )


def probe(args: argparse.Namespace) -> None:
    from vjepa.evals.probe import probe, table

    result = probe(
        args.model,
        args.shards,
        out=args.out,
        split=args.split,
        train_split=args.train_split,
        labels=args.labels,
        part=args.part,
        overwrite=args.overwrite,
    )
    print(table(result))


def report(args: argparse.Namespace) -> None:
    from vjepa.report import report

    report(args.source, args.out, overwrite=args.overwrite)
