"""Verbs for dataset builders: raw videos to shards, and checks of shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token

from vjepa.cli.app import Count, Number, Settings, Several, Workers, verb
from vjepa.cli.cluster import shard_on_cluster
from vjepa.progress import progress
from vjepa.threads import available_cores


def parse_task(kind: Any, tokens: Sequence[Token]) -> tuple[int, int]:
    """Convert the word K/N to two numbers."""
    number, _, count = tokens[-1].value.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ValueError(f"{tokens[-1].value!r} is not K/N with K from 0 to N - 1, such as 3/32")
    return int(number), int(count)


@verb("shard", example="shard my/videos --out corpus name=kitchen split.val_share=0.05")
def shard(
    *sources: str,
    out: Path,
    spec: Path | None = None,
    dry_run: bool = False,
    status: bool = False,
    task: Annotated[tuple[int, int] | None, Parameter(converter=parse_task, n_tokens=1, metavar="K/N")] = None,
    on: str | None = None,
    tasks: Count | None = None,
    workers: Workers = None,
    settings: Settings,
) -> None:
    """Turn raw videos into shards. May be killed and started again.

    Args:
        sources: Folders, video files, tables of videos, tars, URLs.
        out: Folder for the corpus.
        spec: YAML file with the settings of the build.
        dry_run: Read all sources and print counts and costs. Write nothing.
        status: Print the progress of the builders that write to --out, on this and other machines.
        task: Build as task K of an array of N, counted from 0.
        on: Build as an array of jobs on a cluster: a profile, or a name in launch/clusters.
        tasks: Jobs of --on, a node each. By default the profile's nodes.
    """
    from vjepa_data.builder import status as builders
    from vjepa_data.builder.shard import shard
    from vjepa_data.builder.survey import survey
    from vjepa_data.config_files import load_settings
    from vjepa_data.errors import BadInput
    from vjepa_data.spec import Spec

    if status:
        print(builders.read_status(out).text())
        return
    if not sources:
        raise BadInput("SOURCES is missing; give folders, video files, tables of videos, tars or URLs")
    loaded = load_settings(Spec, spec, settings).settings
    workers = workers or available_cores()
    if on:
        shard_on_cluster(sources, out, spec=loaded, on=on, tasks=tasks, dry_run=dry_run)
        return
    if dry_run:
        print("\n".join(survey(sources, spec=loaded, workers=workers, out=out).lines()))
        return
    manifest = shard(sources, out, spec=loaded, workers=workers, task=task)
    parts = [
        f"{builders.format_count(int(split['samples']), 'clip')} "
        f"({builders.format_duration(split['seconds'])}) in {name}"
        for name, split in manifest.splits.items()
    ]
    if refused := builders.count_rejects(out):
        parts.append(f"rejected: {', '.join(f'{count} {reason}' for reason, count in refused.items())}")
    print(f"{out}: {', '.join(parts)}; corpus {manifest.hash[:12]}; report in {out / 'report.html'}")


@verb("index", example="index shards-of-others --out admitted --split '*val*=val'")
def index(
    place: str,
    /,
    *,
    out: Path | None = None,
    name: str | None = None,
    split: tuple[str, ...] = (),
    deep: bool = False,
    workers: Workers = None,
) -> None:
    """Admit foreign WebDataset shards: write the index that a run needs.

    Args:
        place: Folder of tars, s3://bucket/prefix/, or https://host/a-{0000..0099}.tar.
        out: Folder for the index, with links to local tars. By default PLACE itself.
        name: Name of the corpus. By default the name of PLACE.
        split: PATTERN=NAME: put tars whose names match the pattern into this split. May be repeated.
        deep: Decode every clip from the first to the last frame.
    """
    from vjepa_data.builder.index_foreign import index_shards
    from vjepa_data.corpus.http_client import public_url
    from vjepa_data.errors import BadInput

    splits = {}
    for word in split:
        pattern, equals, split_name = word.rpartition("=")
        if not equals:
            raise BadInput(f"--split {word!r} is not PATTERN=NAME, such as '*val*=val'")
        splits[pattern] = split_name
    workers = workers or available_cores()
    with progress("reading tars") as advance:
        found = index_shards(place, out=out, name=name, splits=splits, deep=deep, workers=workers, advance=advance)
    samples = sum(split["samples"] for split in found.manifest.splits.values())
    print(f"{out or public_url(place)}: {samples} samples admitted; corpus {found.manifest.hash[:12]}")
    for text, counts in (("not of the canonical form", found.flaws), ("left out", found.rejects)):
        for reason, times in counts.items():
            print(f"  {times} {text}: {reason}")


@verb("verify", example="verify corpus --deep")
def verify(place: str, /, *, deep: bool = False, workers: Workers = None) -> int:
    """Check a corpus against its manifest, or the checkpoints of a run against their digests.

    Args:
        place: Folder or address of a corpus, or folder of a run.
        deep: Decode every clip of a corpus as well.
    """
    from vjepa_data.corpus.http_client import public_url
    from vjepa_data.errors import BadInput

    folder = Path(place)
    if folder.is_dir() and not any(
        (folder / name).exists() for name in ("manifest.json", "config.yaml", "checkpoints")
    ):
        raise BadInput(f"{folder} is neither a corpus (manifest.json is missing) nor a run (config.yaml is missing)")
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        from vjepa.checkpoints.checkpoint import checkpoint_dir, find_corruption, list_checkpoints

        paths = list_checkpoints(checkpoint_dir(folder))
        if not paths:
            raise BadInput(f"{folder} is a run without a checkpoint, so there is nothing to verify; train it first")
        problems = []
        with progress("reading checkpoints") as advance:
            for done, path in enumerate(paths, 1):
                if corruption := find_corruption(path):
                    problems.append(f"{path}: {corruption}")
                advance(done, len(paths))
        checked = f"{len(paths)} checkpoints"
    else:
        from vjepa_data.builder.verify import verify as verify_corpus

        with progress("reading shards") as advance:
            verdict = verify_corpus(place, deep=deep, workers=workers or available_cores(), advance=advance)
        problems = verdict.problems
        checked = f"{verdict.samples} samples" + (f", {verdict.decoded} of them decoded" if deep else "")
    for problem in problems:
        print(problem)
    print(f"{public_url(place)}: {checked}: {len(problems)} problems")
    return 1 if problems else 0


@verb("merge", example="merge corpus admitted --out mixture.yaml --weights 0.7 0.3")
def merge(
    corpora: list[str],
    /,
    *,
    out: Path,
    split: str = "train",
    by: Literal["clips", "hours", "equal"] = "clips",
    weights: Annotated[tuple[float, ...] | None, Several] = None,
    base: Path | None = None,
) -> None:
    """Mix several corpora as the sources of a run, each with its licence and share.

    Args:
        corpora: Folders or addresses of corpora.
        out: YAML file: a run file, or its `base:`.
        split: Split to take of each corpus.
        by: Give each corpus a share in proportion to its clips or hours, or equal shares.
        weights: Share of each corpus, in place of --by.
        base: Run file with all other settings.
    """
    from vjepa_data.corpus.merge import merge, write_mixture

    found = merge(corpora, split=split, by=by, weights=weights)
    write_mixture(found, out, base=base)
    for warning in found.warnings:
        print(f"warning: {warning}")
    shares = ", ".join(f"{part.source.weight:.1%} {part.name}" for part in found.parts)
    print(f"{out}: {shares}; use it with `base: {out.name}`, or give --base")


@verb("synthesize", example="synthesize two_room --out videos --videos 100 --policy mixed")
def synthesize(
    kind: Literal["physics", "violations", "curtain", "two_room", "push"] = "physics",
    /,
    *,
    out: Path,
    videos: Count = 800,
    seed: Number = 0,
    policy: Literal["wander", "expert", "mixed"] | None = None,
    layout: Literal["fixed", "random", "held_out"] | None = None,
    px: Count | None = None,
    frames: Count | None = None,
    form: Literal["videos", "lerobot"] | None = None,
) -> None:
    """Write generated scenes with known truth as labelled mp4 files. A world with actions also writes its signals.

    Args:
        kind: World to generate: `physics`: shapes that fall, bounce and hide. `violations`: possible and impossible
            films for `vjepa eval surprise`. `curtain`: shapes behind a curtain that closes for up to 30 s. `two_room`:
            a disc that moves through a door. `push`: a disc that pushes another.
        out: Folder for the videos and their labels.
        videos: Number of videos, or of quadruplets of films for `violations`.
        seed: Another seed gives other videos.
        policy: Who acts in a world with actions: at random, towards goals, or half of the episodes each (default).
        layout: The same layout for all episodes (default), random layouts, or layouts that `random` never draws.
        px: Height and width of a frame in pixels. Default: 64, for `curtain` 48.
        frames: Length of an episode. Default: 33 frames at 10 per second.
        form: Signals of a world as sidecar files of the videos (default), or everything as a LeRobot folder.
    """
    from vjepa_data.errors import BadInput

    given = {"policy": policy, "layout": layout, "px": px, "frames": frames, "form": form}
    chosen = {name: value for name, value in given.items() if value is not None}
    with progress("writing videos") as advance:
        if kind in ("physics", "violations"):
            from vjepa_data.synthetic.physics import write_corpus
            from vjepa_data.synthetic.violations import write_violations

            if chosen:
                raise BadInput(f"--{min(chosen)} is for two_room and push; {kind} takes --out, --videos and --seed")
            if kind == "physics":
                write_corpus(out, videos=videos, seed=seed, advance=advance)
            else:
                write_violations(out, quadruplets=videos, seed=seed, advance=advance)
        elif kind == "curtain":
            from vjepa_data.synthetic.curtain import write_curtains

            if unfit := sorted(chosen.keys() - {"px"}):
                raise BadInput(f"--{unfit[0]} is for two_room and push; curtain takes --out, --videos, --seed and --px")
            write_curtains(out, videos=videos, seed=seed, advance=advance, **chosen)
        else:
            from vjepa_data.worlds.episodes import WORLDS
            from vjepa_data.worlds.files import write_episodes

            write_episodes(WORLDS[kind], out, episodes=videos, seed=seed, advance=advance, **chosen)
    if kind in ("two_room", "push"):
        print(f"{out}: {videos} episodes; shard them with `vjepa shard {out} --spec {out / 'spec.yaml'} --out corpus`")
