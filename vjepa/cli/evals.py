"""The evaluations: `vjepa eval NAME MODEL DATA`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vjepa.cli.app import Count, Number, Overwrite, Part, Several, verb, verb_group
from vjepa.cli.progress import progress

Model = Annotated[Path, Parameter(help="A run, a checkpoint, or an export.")]
Corpus = Annotated[Path, Parameter(help="A corpus whose samples carry labels.")]
Split = Annotated[str, Parameter(help="Split to report on.")]
Baselines = Annotated[bool, Parameter(help="Compare with an untrained encoder and with pixels.")]
Publish = Annotated[bool, Parameter(help="Add the numbers to the record of the run at W&B.")]

verb_group("eval", "Evaluate frozen features.")


@verb("eval probe", example="eval probe model corpus --out probe.json")
def probe(
    model: Model,
    data: Corpus,
    /,
    *,
    out: Path | None = None,
    split: Split = "val",
    train_split: str | None = None,
    labels: Annotated[tuple[str, ...] | None, Several] = None,
    clips_per_video: Count = 3,
    max_videos: Count | None = None,
    random_seeds: Count = 3,
    part: Part = "target",
    seed: Number = 0,
    wandb: Publish = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit linear probes, compared with an untrained encoder, pixels and the prior.

    Args:
        out: JSON file for the result.
        train_split: Split to fit on. By default two thirds of the videos of --split.
        labels: Labels to predict. By default all.
        clips_per_video: Clips of each video, evenly spaced.
        max_videos: Videos of each split. By default all.
        random_seeds: Number of untrained encoders.
        seed: Seed of the split into videos and of the intervals.
    """
    from vjepa.evals.linear import probe

    with progress("evaluating"):
        result = probe(
            model, data, out=out, split=split, train_split=train_split, labels=labels, clips_per_video=clips_per_video,
            max_videos=max_videos, random_seeds=random_seeds, part=part, seed=seed, overwrite=overwrite,
        )  # fmt: skip
    print_result(result, model, wandb=wandb)


@verb("eval attentive", example="eval attentive model corpus --label shape --out attentive.json")
def attentive(
    model: Model,
    data: Corpus,
    /,
    *,
    label: str,
    out: Path,
    split: Split = "val",
    train_split: str | None = None,
    clips_per_video: Count = 2,
    views: Count = 1,
    baselines: Baselines = False,
    part: Part = "target",
    seed: Number = 0,
    wandb: Publish = False,
    overwrite: Overwrite = False,
) -> None:
    """Train V-JEPA 2's attentive probe over a grid of learning rates, selected on separate videos.

    Args:
        label: Label to predict.
        out: JSON file for the result. The selected probe is written beside it.
        train_split: Split to fit on. By default half of the videos of --split.
        clips_per_video: Clips of each video, evenly spaced.
        views: Square crops of each clip. 1 takes the whole frame.
        seed: Seed of the split into videos and of the probes.
    """
    from vjepa.evals.attentive import attentive

    with progress("evaluating"):
        result = attentive(
            model, data, label=label, out=out, split=split, train_split=train_split, clips_per_video=clips_per_video,
            views=views, baselines=baselines, part=part, seed=seed, overwrite=overwrite,
        )  # fmt: skip
    print_result(result, model, wandb=wandb)


@verb("eval knn", example="eval knn model corpus --query more.mp4 --out nearest.html")
def knn(
    model: Model,
    data: Corpus,
    /,
    *,
    out: Path,
    label: str | None = None,
    query: Path | None = None,
    split: Split = "val",
    baselines: Baselines = False,
    part: Part = "target",
    wandb: Publish = False,
    overwrite: Overwrite = False,
) -> None:
    """Find nearest neighbours in feature space: a vote about a label, or a page for a video.

    Args:
        out: JSON file for the result, or HTML file for the page.
        label: Report how often the nearest neighbours vote for the right value of this label.
        query: Show the clips that are most similar to this video.
    """
    from vjepa.evals.knn import knn, nearest_page
    from vjepa_data.errors import BadInput

    if (label is None) == (query is None):
        raise BadInput("give either --label or --query")
    with progress("evaluating"):
        if query is not None:
            for key, cosine in nearest_page(model, data, query, out, split=split, part=part, overwrite=overwrite):
                print(f"{cosine:.3f}  {key}")
            return
        assert label is not None
        result = knn(
            model, data, label=label, out=out, baselines=baselines, split=split, part=part, overwrite=overwrite
        )
    print_result(result, model, wandb=wandb)


def print_result(result: dict[str, Any], model: Path, *, wandb: bool) -> None:
    """Print a result as a table, and publish it at W&B if asked."""
    from vjepa.evals.publish import publish
    from vjepa.evals.results import table

    print(table(result))
    if wandb:
        publish(result, model)
