"""Verbs for those who build corpora: raw videos to shards that can be trusted."""

import argparse
from pathlib import Path

from vjepa.cli.verb import Verbs, out, workers


def add_verbs(verbs: Verbs) -> None:
    """Declare them."""
    verb = verbs.add("shard", shard, "raw videos to shards; may be killed and started again", settings=True)
    verb.add_argument("sources", nargs="*", metavar="SOURCE", help="folders, video files, tables of videos, tars, URLs")
    out(verb, "folder for the corpus")
    verb.add_argument("--spec", type=Path, help="YAML file with the settings of the build")
    verb.add_argument(
        "--dry-run", action="store_true", help="look at everything, say what it would cost, write nothing"
    )
    verb.add_argument("--status", action="store_true", help="how far the builders on --out are, wherever they run")
    workers(verb)

    verb = verbs.add("index", index, "admit foreign WebDataset shards: write the index that a run needs")
    verb.add_argument("folder", type=Path, help="holds tars, at any depth")
    out(verb, "folder for the index, with links to the tars (default: the folder itself)", required=False)
    verb.add_argument("--name", help="of the corpus (default: the folder's)")
    verb.add_argument(
        "--split", action="append", default=[], metavar="PATTERN=NAME", help="tars whose names fit belong to this split"
    )
    verb.add_argument("--deep", action="store_true", help="decode every clip from first to last frame")
    workers(verb)

    verb = verbs.add("verify", verify, "a corpus against its manifest, or a run's checkpoints against their digests")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--deep", action="store_true", help="decode every clip of a corpus as well")
    workers(verb)

    verb = verbs.add("synthesize", synthesize, "write generated physics scenes as labelled mp4 files")
    out(verb, "folder for the videos and their labels")
    verb.add_argument("--videos", type=int, default=800, help="how many (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0)


def shard(args: argparse.Namespace) -> None:
    from vjepa_data.build.shard import shard
    from vjepa_data.build.status import status
    from vjepa_data.build.survey import survey
    from vjepa_data.settings import BadInput
    from vjepa_data.settings_files import load_settings
    from vjepa_data.spec import Spec

    if args.status:
        print(status(args.out).text())
        return
    if not args.sources:
        raise BadInput("no sources; give folders, video files, tables of videos, tars or URLs")
    spec = load_settings(Spec, args.spec, args.overrides).settings
    if args.dry_run:
        print("\n".join(survey(args.sources, spec=spec, workers=args.workers).lines()))
        return
    manifest = shard(args.sources, args.out, spec=spec, workers=args.workers)
    splits = [
        f"{one['samples']} clips ({one['seconds'] / 60:.1f} min) in {name}" for name, one in manifest.splits.items()
    ]
    print(f"{args.out}: {', '.join(splits)}; corpus {manifest.hash[:12]}; report in {args.out / 'report.html'}")


def index(args: argparse.Namespace) -> None:
    from vjepa_data.admit import admit
    from vjepa_data.settings import BadInput

    splits = {}
    for word in args.split:
        pattern, equals, name = word.rpartition("=")
        if not equals:
            raise BadInput(f"--split {word!r}: expected PATTERN=NAME, such as '*val*=val'")
        splits[pattern] = name
    found = admit(args.folder, out=args.out, name=args.name, splits=splits, deep=args.deep, workers=args.workers)
    samples = sum(one["samples"] for one in found.manifest.splits.values())
    print(f"{args.out or args.folder}: {samples} samples admitted; corpus {found.manifest.hash[:12]}")
    for text, counts in (("not of the canonical form", found.flaws), ("left out", found.rejects)):
        for reason, count in counts.items():
            print(f"  {count} {text}: {reason}")


def verify(args: argparse.Namespace) -> int:
    if (args.folder / "checkpoints").is_dir():
        from vjepa.run.checkpoint import damage, list_checkpoints

        found = [(path, damage(path)) for path in list_checkpoints(args.folder)]
        problems = [f"{path}: {wrong}" for path, wrong in found if wrong]
        what = f"{len(found)} checkpoints"
    else:
        from vjepa_data.verify import verify as verify_corpus

        verdict = verify_corpus(args.folder, deep=args.deep, workers=args.workers)
        problems = verdict.problems
        what = f"{verdict.samples} samples" + (f", {verdict.decoded} of them decoded" if args.deep else "")
    for problem in problems:
        print(problem)
    print(f"{args.folder}: {what}: {len(problems)} problems")
    return 1 if problems else 0


def synthesize(args: argparse.Namespace) -> None:
    from vjepa_data.synthetic import write_corpus

    write_corpus(args.out, videos=args.videos, seed=args.seed)
