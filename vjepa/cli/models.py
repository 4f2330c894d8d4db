"""Verbs for users of trained models: exports, imports, features, reports."""

from pathlib import Path
from typing import Annotated, Literal

from vjepa.cli.app import Amount, Count, Number, Overwrite, Part, Several, verb, whole_number
from vjepa.progress import progress

Files = Annotated[tuple[Path, ...], Several]


@verb("export", example="export runs/demo/run --out model")
def export(
    run: Path,
    /,
    *,
    out: Path,
    format: Literal["hf", "native", "pt2", "onnx"] = "hf",
    part: Part = "target",
    mask_kind: Number | None = None,
    probe: Path | None = None,
    results: Files = (),
    licence: str = "other",
    stream: bool = False,
    window: Count | None = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a model for other programs. It is loaded back and compared.

    Args:
        run: A run folder, a checkpoint, or another export.
        out: New folder.
        format: For transformers (hf), our own format (native), torch.export (pt2), or ONNX (onnx).
        mask_kind: Kind of mask whose token an hf export's predictor uses.
        probe: A probe from `vjepa eval attentive`: export a classifier.
        results: Files from `vjepa eval`, for the model card.
        licence: Licence of the weights, for the model card.
        stream: Export a step of a stream with its cache (pt2, onnx), of a causal model.
        window: Tubelets that a token of the stream attends to. By default as the model was trained.
    """
    from vjepa.export.export import export

    with progress("exporting"):
        export(
            run, out, format=format, part=part, mask_kind=mask_kind, probe=probe, results=results, licence=licence,
            stream=stream, window=window, overwrite=overwrite,
        )  # fmt: skip


@verb("import", example="import vitl.pt --out runs/vitl")
def import_model(
    source: Path,
    /,
    *,
    out: Path,
    heads: Count | None = None,
    predictor_heads: Count | None = None,
    px: Count | None = None,
    frames: Count | None = None,
    fps: Amount = 4.0,
    mask_tokens: Annotated[tuple[int, ...] | None, Several, whole_number(0)] = None,
    positions: Literal["rope", "sincos"] | None = None,
    objective: Literal["vjepa2", "vjepa2_1", "levjepa"] | None = None,
    overwrite: Overwrite = False,
) -> None:
    """Import a published model as a checkpoint that training can start from.

    Args:
        source: A released file of V-JEPA, 2, 2-AC or 2.1, or a Hugging Face folder.
        out: Folder for the checkpoint, laid out like a run folder.
        heads: Attention heads of a .pt file's encoder. By default the registry's number for its size.
        predictor_heads: Attention heads of its predictor. By default 12, of V-JEPA 2-AC 16, of the first V-JEPA the
            encoder's.
        px: Side of its clips, which a .pt file does not store. By default 256.
        frames: Frames of its clips. By default 16, and 8 for V-JEPA 2-AC.
        fps: Frames per second of its clips.
        mask_tokens: For each kind of mask, the number of the file's mask token.
        positions: Rotary (V-JEPA 2, 2.1) or added sines and cosines (V-JEPA). By default the release is recognized by
            several marks of the .pt file and logged.
        objective: Method whose untrained predictor is added to a lone encoder. By default the encoder tells.
    """
    from vjepa.weights.fair_checkpoints import Sizes
    from vjepa.weights.import_checkpoint import import_checkpoint

    sizes = Sizes(
        heads=heads, predictor_heads=predictor_heads, px=px, frames=frames, fps=fps, mask_tokens=mask_tokens,
        positions=positions, objective=objective,
    )  # fmt: skip
    with progress("importing"):
        text = import_checkpoint(source, out, sizes, overwrite=overwrite)
    print(text)


@verb("embed", example="embed model my/videos --out features.parquet")
def embed(
    model: Path,
    videos: list[Path],
    /,
    *,
    out: Path,
    what: Literal["clip", "time", "token"] = "clip",
    split: str = "train",
    clips_per_video: Count = 1,
    views: Count = 1,
    short: Literal["leave_out", "hold"] | None = None,
    clip_s: Amount | None = None,
    every_s: Amount | None = None,
    stream: bool = False,
    window: Count | None = None,
    every: str | None = None,
    part: Part = "target",
    device: str | None = None,
    batch: Count = 8,
    workers: Count = 2,
    timeout_s: Amount = 120.0,
    overwrite: Overwrite = False,
) -> None:
    """Compute the features of a folder of videos.

    Args:
        model: A run, a checkpoint, or an export.
        videos: Files and folders, or a corpus. With --stream also pipes, and - for standard input.
        out: File: .parquet, .npy or .safetensors.
        what: Write a vector per clip, per time step, or per token.
        split: Split of a corpus.
        clips_per_video: Clips of each video, evenly spaced.
        views: Square crops of each clip. 1 takes the whole frame.
        short: Leave out videos shorter than a clip, or hold their last frame. By default as the model was trained.
        clip_s: Seconds of video that a clip spans. By default as the model was trained.
        every_s: Seconds from the start of a clip to the next, instead of a number of clips. Clips may overlap.
        stream: Go through whole videos with a causal model: a row per tubelet, in flat memory.
        window: Tubelets of a stream that a token attends to. By default as the model was trained.
        every: Time from row to row of a stream: 1s, 500ms. By default every tubelet has a row.
        device: Device to compute on. By default a GPU, if any.
        batch: Clips that are encoded together.
        workers: Processes that decode files.
        timeout_s: Seconds after which a file is given up.
    """
    from vjepa_data.errors import BadInput

    if stream:
        from vjepa.evals.embed_stream import embed_stream

        unfit = {"--clips-per-video": clips_per_video > 1, "--views": views > 1, "--short": short is not None}
        unfit["--every-s"] = every_s is not None
        if given := [name for name, is_given in unfit.items() if is_given]:
            hint = "leave it out, or write --every 1s" if every_s is not None else "leave it out"
            raise BadInput(f"{', '.join(given)} cannot be combined with --stream, which has no clips; {hint}")
        embed_stream(
            model, videos, out, window=window, every=every, what=what, split=split, clip_s=clip_s, part=part,
            device=usable_device(device), timeout_s=timeout_s, overwrite=overwrite,
        )  # fmt: skip
        return
    if window is not None or every is not None:
        raise BadInput(
            f"{'--every' if window is None else '--window'} belongs to streams; add --stream, or leave it out"
        )
    from vjepa.evals.embed import embed

    embed(
        model, videos, out, what=what, split=split, clips_per_video=clips_per_video, views=views, short=short,
        clip_s=clip_s, every_s=every_s, part=part, device=usable_device(device), batch=batch, workers=workers,
        timeout_s=timeout_s, overwrite=overwrite,
    )  # fmt: skip


def usable_device(device: str | None) -> str | None:
    """Return the name of a device that torch can use here.

    Raises:
        BadInput: torch does not know the device, or cannot use it on this machine.
    """
    import torch

    from vjepa_data.errors import BadInput

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"--device {device} cannot be used here ({reason}); give cpu, or cuda:0 on a GPU") from None
    return device


@verb("report", example="report model --clips my/videos --results probe.json")
def report(
    source: Path,
    /,
    *,
    out: Path | None = None,
    clips: Files = (),
    results: Files = (),
    overwrite: Overwrite = False,
) -> None:
    """Write an HTML page about a run, a model or a corpus.

    Args:
        source: A run folder, an export, or a corpus.
        out: HTML file. By default report.html in that folder.
        clips: For a model: videos whose features are shown.
        results: For a model: files from `vjepa eval`.
    """
    from vjepa.report.build import report

    with progress("writing the report"):
        page = report(source, out, clips=clips, results=results, overwrite=overwrite)
    print(page)
