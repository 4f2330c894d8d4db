"""Verbs for those who build corpora: raw videos to shards that can be trusted."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vjepa.cli.cluster import shard_on_cluster
from vjepa.cli.verb import Verbs, count, number, out, workers


def add_verbs(verbs: Verbs) -> None:
    """Declare them."""
    verb = verbs.add(
        "shard",
        shard,
        "raw videos to shards; may be killed and started again",
        settings=True,
        example="shard my/videos --out corpus name=kitchen split.val_share=0.05",
    )
    verb.add_argument("sources", nargs="*", metavar="SOURCE", help="folders, video files, tables of videos, tars, URLs")
    out(verb, "folder for the corpus")
    verb.add_argument("--spec", type=Path, metavar="FILE", help="YAML file with the settings of the build")
    verb.add_argument(
        "--dry-run", action="store_true", help="look at everything, say what it would cost, write nothing"
    )
    verb.add_argument("--status", action="store_true", help="how far the builders on --out are, wherever they run")
    verb.add_argument("--task", type=task, metavar="K/N", help="this is task K of an array of N, counted from 0")
    verb.add_argument("--on", metavar="CLUSTER", help="as an array of jobs: a profile, or a name in launch/clusters")
    verb.add_argument("--tasks", type=count, metavar="N", help="jobs of --on, a node each (default: its nodes)")
    workers(verb)

    verb = verbs.add(
        "index",
        index,
        "admit foreign WebDataset shards: write the index that a run needs",
        example="index shards-of-others --out admitted --split '*val*=val'",
    )
    verb.add_argument(
        "place", metavar="PLACE", help="folder of tars; or s3://bucket/prefix/, or https://host/a-{0000..0099}.tar"
    )
    out(verb, "folder for the index, with links to local tars (default: the folder itself)", required=False)
    verb.add_argument("--name", metavar="NAME", help="of the corpus (default: the place's)")
    verb.add_argument(
        "--split", action="append", default=[], metavar="PATTERN=NAME", help="tars whose names fit belong to this split"
    )
    verb.add_argument("--deep", action="store_true", help="decode every clip from first to last frame")
    workers(verb)

    verb = verbs.add(
        "verify",
        verify,
        "a corpus against its manifest, or a run's checkpoints against their digests",
        example="verify corpus --deep",
    )
    verb.add_argument("place", metavar="PLACE", help="folder or address of a corpus, or folder of a run")
    verb.add_argument("--deep", action="store_true", help="decode every clip of a corpus as well")
    workers(verb)

    verb = verbs.add(
        "merge",
        merge,
        "several corpora as the sources of one run, each with its licence and share",
        example="merge corpus admitted --out mixture.yaml --weights 0.7 0.3",
    )
    verb.add_argument("corpora", nargs="+", metavar="CORPUS", help="folders or addresses of corpora")
    out(verb, "YAML file: a run's, or its `base:`")
    verb.add_argument("--split", metavar="NAME", default="train", help="which split of each (default: %(default)s)")
    verb.add_argument(
        "--by", choices=("clips", "hours", "equal"), default="clips", help="shares in proportion (default: %(default)s)"
    )
    verb.add_argument("--weights", nargs="+", type=float, metavar="SHARE", help="by hand, one for each corpus")
    verb.add_argument("--base", type=Path, metavar="FILE", help="run file with all other settings")

    verb = verbs.add(
        "synthesize",
        synthesize,
        "write generated physics scenes as labelled mp4 files",
        example="synthesize --out videos --videos 100",
    )
    out(verb, "folder for the videos and their labels")
    verb.add_argument("--videos", type=count, default=800, metavar="N", help="how many (default: %(default)s)")
    verb.add_argument(
        "--seed", type=number, default=0, metavar="N", help="other videos for another (default: %(default)s)"
    )


def task(text: str) -> tuple[int, int]:
    """K and N of the word K/N."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 0 to N - 1, such as 3/32")
    return int(number), int(count)


def shard(args: argparse.Namespace) -> None:
    from vjepa_data.builder.shard import shard
    from vjepa_data.builder.status import count_rejects, format_count, format_duration, read_status
    from vjepa_data.builder.survey import survey
    from vjepa_data.config_files import load_settings
    from vjepa_data.settings import BadInput
    from vjepa_data.spec import Spec

    if args.status:
        print(read_status(args.out).text())
        return
    if not args.sources:
        raise BadInput("no sources; give folders, video files, tables of videos, tars or URLs")
    spec = load_settings(Spec, args.spec, args.overrides).settings
    if args.on:
        shard_on_cluster(args, spec)
        return
    if args.dry_run:
        print("\n".join(survey(args.sources, spec=spec, workers=args.workers, out=args.out).lines()))
        return
    manifest = shard(args.sources, args.out, spec=spec, workers=args.workers, task=args.task)
    refused = count_rejects(args.out)
    parts = [
        f"{format_count(int(one['samples']), 'clip')} ({format_duration(one['seconds'])}) in {name}"
        for name, one in manifest.splits.items()
    ]
    if refused:
        parts.append(f"rejected: {', '.join(f'{count} {reason}' for reason, count in refused.items())}")
    print(f"{args.out}: {', '.join(parts)}; corpus {manifest.hash[:12]}; report in {args.out / 'report.html'}")


def index(args: argparse.Namespace) -> None:
    from vjepa_data.builder.index_foreign import index_shards
    from vjepa_data.settings import BadInput

    splits = {}
    for word in args.split:
        pattern, equals, name = word.rpartition("=")
        if not equals:
            raise BadInput(f"--split {word!r}: expected PATTERN=NAME, such as '*val*=val'")
        splits[pattern] = name
    with bar("reading tars") as advance:
        found = index_shards(
            args.place,
            out=args.out,
            name=args.name,
            splits=splits,
            deep=args.deep,
            workers=args.workers,
            advance=advance,
        )
    samples = sum(one["samples"] for one in found.manifest.splits.values())
    print(f"{args.out or args.place}: {samples} samples admitted; corpus {found.manifest.hash[:12]}")
    for text, counts in (("not of the canonical form", found.flaws), ("left out", found.rejects)):
        for reason, times in counts.items():
            print(f"  {times} {text}: {reason}")


@contextlib.contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is: what it gives is called with what is done, and all there is."""
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True))
    with contextlib.ExitStack() as stack:

        def advance(done: int, total: int) -> None:
            if not progress.tasks:
                stack.enter_context(progress)
                progress.add_task(text)
            progress.update(progress.task_ids[0], completed=done, total=total)

        yield advance


def verify(args: argparse.Namespace) -> int:
    folder = Path(args.place)
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        from vjepa.checkpoints.checkpoint import checkpoint_dir, find_corruption, list_checkpoints

        found = [(path, find_corruption(path)) for path in list_checkpoints(checkpoint_dir(folder))]
        problems = [f"{path}: {wrong}" for path, wrong in found if wrong]
        what = f"{len(found)} checkpoints"
    else:
        from vjepa_data.builder.verify import verify as verify_corpus

        with bar("reading shards") as advance:
            verdict = verify_corpus(args.place, deep=args.deep, workers=args.workers, advance=advance)
        problems = verdict.problems
        what = f"{verdict.samples} samples" + (f", {verdict.decoded} of them decoded" if args.deep else "")
    for problem in problems:
        print(problem)
    print(f"{args.place}: {what}: {len(problems)} problems")
    return 1 if problems else 0


def merge(args: argparse.Namespace) -> None:
    from vjepa_data.corpus.merge import merge, write_mixture

    found = merge(args.corpora, split=args.split, by=args.by, weights=args.weights)
    write_mixture(found, args.out, base=args.base)
    for warning in found.warnings:
        print(f"warning: {warning}")
    shares = ", ".join(f"{part.source.weight:.1%} {part.name}" for part in found.parts)
    print(f"{args.out}: {shares}; use it with `base: {args.out.name}`, or give --base")


def synthesize(args: argparse.Namespace) -> None:
    from vjepa_data.synthetic.physics import write_corpus

    write_corpus(args.out, videos=args.videos, seed=args.seed)
