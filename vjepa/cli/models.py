"""Verbs for those who use what came out: exports, features, probes, a report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vjepa.cli.verb import Verbs, amount, count, number, out, overwrite


def add_verbs(verbs: Verbs) -> None:
    """Declare them."""
    _declare_export(verbs)
    _declare_import(verbs)
    _declare_embed(verbs)
    group = verbs.group("eval", "what frozen features are worth")
    _declare_probe(group)
    _declare_attentive(group)
    _declare_knn(group)
    _declare_report(verbs)


def _declare_export(verbs: Verbs) -> None:
    verb = verbs.add(
        "export",
        export,
        "a model for others to load, loaded back and compared",
        example="export runs/demo/run --out model",
    )
    verb.add_argument("source", type=Path, metavar="RUN", help="a run folder, a checkpoint, or another export")
    out(verb, "new folder")
    verb.add_argument(
        "--format",
        choices=("hf", "native", "pt2"),
        default="hf",
        help="for transformers, our own, or torch.export (default: %(default)s)",
    )
    _part(verb)
    verb.add_argument(
        "--mask-kind", type=number, metavar="K", help="which kind of mask an hf export's predictor answers to"
    )
    verb.add_argument(
        "--probe", type=Path, metavar="FILE", help="a probe by `vjepa eval attentive`: export a classifier"
    )
    verb.add_argument(
        "--results", type=Path, nargs="+", default=(), metavar="FILE", help="files by `vjepa eval`, for the model card"
    )
    verb.add_argument("--licence", metavar="NAME", default="other", help="licence of the weights, for the model card")
    overwrite(verb)


def _declare_import(verbs: Verbs) -> None:
    verb = verbs.add(
        "import", import_, "a model of others as a checkpoint to go on from", example="import vitl.pt --out runs/vitl"
    )
    verb.add_argument(
        "source", type=Path, metavar="SOURCE", help="a released file of V-JEPA, 2 or 2.1, or a Hugging Face folder"
    )
    out(verb, "folder for the checkpoint, laid out as a run's")
    verb.add_argument(
        "--heads", type=count, metavar="N", help="of a .pt file's encoder (default: the registry's for its size)"
    )
    verb.add_argument(
        "--predictor-heads",
        type=count,
        metavar="N",
        help="of its predictor (default: 12; the encoder's for the first V-JEPA)",
    )
    verb.add_argument(
        "--px", type=count, metavar="N", help="of its clips, which a .pt file does not tell (default: 256)"
    )
    verb.add_argument("--frames", type=count, metavar="N", help="of its clips (default: 16)")
    verb.add_argument(
        "--fps", type=amount, metavar="RATE", default=4.0, help="frames a second of its clips (default: %(default)s)"
    )
    verb.add_argument(
        "--mask-tokens", type=number, metavar="K", nargs="+", help="which of the file's tokens each kind of mask gets"
    )
    overwrite(verb)


def _declare_embed(verbs: Verbs) -> None:
    verb = verbs.add(
        "embed", embed, "features of a folder of videos", example="embed model my/videos --out features.parquet"
    )
    verb.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint, or an export")
    verb.add_argument("videos", type=Path, nargs="+", metavar="VIDEOS", help="files and folders, or one corpus")
    out(verb, "file: .parquet, .npy or .safetensors")
    verb.add_argument("--what", choices=("clip", "time", "token"), default="clip", help="one vector for each of these")
    verb.add_argument("--split", metavar="NAME", default="train", help="of a corpus (default: %(default)s)")
    verb.add_argument(
        "--clips-per-video", type=count, metavar="N", default=1, help="evenly spaced (default: %(default)s)"
    )
    _views(verb)
    _part(verb)
    verb.add_argument("--device", metavar="NAME", help="where to compute (default: a GPU if there is one)")
    verb.add_argument(
        "--batch", type=count, metavar="N", default=8, help="clips encoded together (default: %(default)s)"
    )
    verb.add_argument(
        "--workers", type=count, metavar="N", default=2, help="processes that decode files (default: %(default)s)"
    )
    verb.add_argument(
        "--timeout-s", type=amount, metavar="S", default=120, help="of one file, then it is given up (default: 120)"
    )
    overwrite(verb)


def _declare_probe(verbs: Verbs) -> None:
    verb = verbs.add(
        "probe",
        probe,
        "linear readouts beside an untrained encoder, pixels and the prior",
        example="eval probe model corpus --out probe.json",
    )
    _labelled(verb)
    verb.add_argument("--train-split", metavar="NAME", help="to fit on (default: two thirds of the videos of --split)")
    verb.add_argument("--labels", nargs="+", metavar="NAME", help="to read out (default: all)")
    verb.add_argument(
        "--clips-per-video", type=count, metavar="N", default=3, help="evenly spaced (default: %(default)s)"
    )
    verb.add_argument("--max-videos", type=count, metavar="N", help="of each split (default: all)")
    verb.add_argument(
        "--random-seeds", type=count, metavar="N", default=3, help="untrained encoders (default: %(default)s)"
    )
    verb.add_argument(
        "--seed", type=number, metavar="N", default=0, help="of the cut and the intervals (default: %(default)s)"
    )
    out(verb, "JSON file for the result", required=False)


def _declare_attentive(verbs: Verbs) -> None:
    verb = verbs.add(
        "attentive",
        attentive,
        "V-JEPA 2's attentive probe over a grid of rates, chosen on other videos",
        example="eval attentive model corpus --label shape --out attentive.json",
    )
    _labelled(verb)
    verb.add_argument("--train-split", metavar="NAME", help="to fit on (default: half of the videos of --split)")
    verb.add_argument("--label", metavar="NAME", required=True, help="to read out")
    verb.add_argument(
        "--clips-per-video", type=count, metavar="N", default=2, help="evenly spaced (default: %(default)s)"
    )
    _views(verb)
    _baselines(verb)
    verb.add_argument(
        "--seed", type=number, metavar="N", default=0, help="of the cut and the probes (default: %(default)s)"
    )
    out(verb, "JSON file for the result; the chosen probe goes beside it")


def _declare_knn(verbs: Verbs) -> None:
    verb = verbs.add(
        "knn",
        knn,
        "what lies near in feature space: a vote about a label, or a page for a video",
        example="eval knn model corpus --query more.mp4 --out nearest.html",
    )
    _labelled(verb)
    ask = verb.add_mutually_exclusive_group(required=True)
    ask.add_argument("--label", metavar="NAME", help="how often neighbours are right about it")
    ask.add_argument("--query", type=Path, metavar="VIDEO", help="show the clips that are most like it")
    _baselines(verb)
    out(verb, "JSON file for the result, or HTML file for the page")


def _declare_report(verbs: Verbs) -> None:
    verb = verbs.add(
        "report",
        report,
        "one page about a run, a model or a corpus",
        example="report model --clips my/videos --results probe.json",
    )
    verb.add_argument("source", type=Path, metavar="RUN|MODEL|SHARDS", help="a run folder, an export, or a corpus")
    out(verb, "HTML file (default: report.html in that folder)", required=False)
    verb.add_argument(
        "--clips", type=Path, nargs="+", default=(), metavar="FILE", help="of a model: videos to show features of"
    )
    verb.add_argument(
        "--results", type=Path, nargs="+", default=(), metavar="FILE", help="of a model: files that `vjepa eval` wrote"
    )
    overwrite(verb)


def _labelled(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint, or an export")
    verb.add_argument("shards", type=Path, metavar="SHARDS", help="a corpus whose samples carry labels")
    verb.add_argument("--split", metavar="NAME", default="val", help="to report on (default: %(default)s)")
    _part(verb)
    verb.add_argument("--wandb", action="store_true", help="add the numbers to the record of the run at W&B")
    overwrite(verb)


def _views(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--views", type=count, metavar="N", default=1, help="squares of each clip; 1 is the whole frame (default: 1)"
    )


def _baselines(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--baselines", action="store_true", help="an untrained encoder and pixels beside it")


def _part(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--part",
        choices=("target", "encoder"),
        default="target",
        help="the moving average, or the online weights (default: %(default)s)",
    )


def export(args: argparse.Namespace) -> None:
    from vjepa.export.export import export

    export(
        args.source,
        args.out,
        format=args.format,
        part=args.part,
        mask_kind=args.mask_kind,
        probe=args.probe,
        results=args.results,
        licence=args.licence,
        overwrite=args.overwrite,
    )


def import_(args: argparse.Namespace) -> None:
    from vjepa.weights.fair_checkpoints import Sizes
    from vjepa.weights.import_checkpoint import import_checkpoint

    sizes = Sizes(
        heads=args.heads,
        predictor_heads=args.predictor_heads,
        px=args.px,
        frames=args.frames,
        fps=args.fps,
        mask_tokens=tuple(args.mask_tokens) if args.mask_tokens else None,
    )
    print(import_checkpoint(args.source, args.out, sizes, overwrite=args.overwrite))


def embed(args: argparse.Namespace) -> None:
    from vjepa.evals.embed import embed

    embed(
        args.model,
        args.videos,
        args.out,
        what=args.what,
        split=args.split,
        clips_per_video=args.clips_per_video,
        views=args.views,
        part=args.part,
        device=_checked(args.device),
        batch=args.batch,
        workers=args.workers,
        timeout_s=args.timeout_s,
        overwrite=args.overwrite,
    )


def _checked(device: str | None) -> str | None:
    """A device that is there.

    Raises:
        BadInput: torch knows none of that name, or cannot use it here.
    """
    import torch

    from vjepa_data.settings import BadInput

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"--device {device} cannot be used here ({reason}); give cpu, or cuda:0 on a GPU") from None
    return device


def probe(args: argparse.Namespace) -> None:
    names = ("split", "train_split", "labels", "clips_per_video", "max_videos", "random_seeds", "seed")
    _evaluate("probe", args, names)


def attentive(args: argparse.Namespace) -> None:
    names = ("label", "split", "train_split", "clips_per_video", "views", "baselines", "seed")
    _evaluate("attentive", args, names)


def knn(args: argparse.Namespace) -> None:
    if not args.query:
        return _evaluate("knn", args, ("label", "split", "baselines"))
    from vjepa.evals.nearest import nearest_page

    how = {"split": args.split, "part": args.part, "overwrite": args.overwrite}
    for clip in nearest_page(args.model, args.shards, args.query, args.out, **how):
        print(f"{clip.cosine:.3f}  {clip.key}")
    return None


def _evaluate(name: str, args: argparse.Namespace, names: Sequence[str]) -> None:
    from vjepa.evals.results import format_table
    from vjepa.evals.shell import run_evaluation

    settings = {option: getattr(args, option) for option in names}
    how = {"out": args.out, "part": args.part, "overwrite": args.overwrite, "wandb": args.wandb}
    print(format_table(run_evaluation(name, args.model, args.shards, settings, **how)))


def report(args: argparse.Namespace) -> None:
    from vjepa.report.build import report

    print(report(args.source, args.out, clips=args.clips, results=args.results, overwrite=args.overwrite))
