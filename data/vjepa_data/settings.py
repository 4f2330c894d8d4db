"""Settings of the data stream. Never imports torch, so that a login node can read them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vjepa_data.errors import BadInput as BadInput


class Settings(BaseModel):
    """A frozen group of settings that rejects unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def without_unused(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return settings without empty values of the given names."""
    return {name: value for name, value in values.items() if value or name not in names}


Share = Annotated[float, Field(ge=0, le=1)]
"""A fraction in [0, 1]."""


class Source(Settings):
    """A corpus of shards and its share of the mixture."""

    shards: str
    """Folder or URL that contains the `manifest.json` written by `vjepa shard` or `vjepa index`."""

    split: str = "train"
    """Split of the corpus to read."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the stream's samples, relative to the other sources' weights."""

    frames: int | None = Field(default=None, ge=1)
    """Frames per clip from this source. Default: `clip.frames`."""

    fps: float | None = Field(default=None, gt=0)
    """Frames per second of video time from this source. Default: `clip.fps`."""

    frame_step: int | None = Field(default=None, ge=1)
    """Instead of `fps`: distance between two frames of a clip in frames of the file, whatever its rate."""

    duration_s: float | None = Field(default=None, gt=0)
    """Instead of `fps`: length of a clip in seconds of video time, with its frames spread evenly."""

    part_s: float | None = Field(default=None, gt=0)
    """Length of the parts in which whole videos are drawn and read, in seconds, such as 120 for long sequences. The
    corpus must have been built with `cut.part_s`, which is the default."""

    per_video: int | None = Field(default=None, ge=1)
    """Clips taken from a video of this source each time it is drawn. Default: `clip.per_video`."""

    corpus: str | None = None
    """Required hash of the corpus, from its manifest. Default: any corpus. `vjepa merge` fills it in."""

    licence: str = ""
    """Licence of the videos. Recorded, not interpreted."""

    origin: str = ""
    """Origin of the videos. Recorded, not interpreted."""

    without: str | None = None
    """File with keys to exclude, line by line, or the `rejected.jsonl` of an earlier run. Changes the stream."""

    @model_validator(mode="after")
    def _one_pace(self) -> "Source":
        given = [name for name in ("fps", "frame_step", "duration_s") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} all set the frame rate of a clip; keep one")
        return self


class Clip(Settings):
    """Length and frame rate of a clip."""

    frames: int = Field(default=16, ge=1)
    """Frames per clip."""

    fps: float = Field(default=4.0, gt=0)
    """Frames per second of video time, not of the file. V-JEPA 2: 16 frames at 4 fps."""

    short: Literal["leave_out", "hold"] = "leave_out"
    """Treatment of videos shorter than a clip. `leave_out` never draws them. `hold` draws them and repeats their
    last frame, as V-JEPA 2 does. Images become clips in the same way."""

    per_video: int = Field(default=1, ge=1)
    """Consecutive clips taken from a video each time it is drawn. More clips read fewer bytes but vary batches less."""

    sequence: int = Field(default=1, ge=1)
    """Ordered clips of a video that share a slot. A batch then holds `sequence` consecutive rows per slot."""

    sequence_gap_s: float = Field(default=0.0, ge=0)
    """Video time between the end of a clip and the start of the next clip of a sequence, in seconds."""


class Crop(Settings):
    """Random resized crop and flip of uint8 frames."""

    px: int = Field(default=256, ge=8)
    """Height and width of the model's input, in pixels."""

    scale: tuple[Share, Share] = (0.3, 1.0)
    """Smallest and largest area of the crop as a fraction of the frame. V-JEPA 2: 0.3 to 1."""

    aspect: tuple[float, float] = (0.75, 1.35)
    """Smallest and largest width / height of the crop. V-JEPA 2: 0.75 to 1.35."""

    flip: Share = 0.5
    """Probability of a horizontal flip. Set 0 if left and right carry meaning."""

    @model_validator(mode="after")
    def _ordered(self) -> "Crop":
        for name in ("scale", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high, got [{low}, {high}]")
        return self


class Rejects(Settings):
    """Limits on unreadable samples. A run that exceeds a limit stops with an error."""

    max_share: Share = 0.01
    """Largest fraction of rejected samples among the last 10,000 draws."""

    max_in_a_row: int = Field(default=100, ge=1)
    """Largest number of consecutive rejected samples."""


class Data(Settings):
    """Settings that determine the pixels of every slot of every step."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Corpora to mix."""

    clip: Clip = Clip()
    crop: Crop = Crop()
    rejects: Rejects = Rejects()

    signals: tuple[str, ...] = ()
    """Numeric signals to batch with the frames, such as `actions`. Every source must hold them."""

    texts: tuple[str, ...] = ()
    """Texts to batch with the frames, such as `caption`. Every source must hold them."""

    lanes: int | None = Field(default=None, ge=1)
    """Number of parallel cursors through an epoch. It must divide the batch size and be a multiple of the number of
    ranks. Default: the largest number that batch and corpus allow, so that a run can resume on any number of ranks."""

    window_shards: int = Field(default=4, ge=1)
    """Number of shards that a lane shuffles together. More shards mix samples better but cause more scattered reads."""


class Loader(Settings):
    """Settings that affect only the speed of the stream, never its contents."""

    workers: int = Field(default=2, ge=0)
    """Worker processes per rank that read, decode and crop. 0 does this work in the training process."""

    prefetch_steps: int = Field(default=2, ge=1)
    """Batches that each worker prepares ahead."""

    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"
    """Start method of worker processes, as in `multiprocessing`."""

    decoder: Literal["decord", "torchcodec", "pyav", "auto"] = "decord"
    """Video decoder. All three return identical pixels for files written by `vjepa shard`. `auto`: training decodes
    a few clips of the corpus with each at its first start, and takes the fastest whose pixels are identical there."""

    crop_on: Literal["cpu", "device"] = "cpu"
    """Device that resizes crops. `device` saves a twentieth of the workers' time. It computes in floats and may differ
    from `cpu` by one of 255 levels. Without a GPU both give the same result."""

    decode_timeout_s: float = Field(default=20.0, gt=0)
    """Time budget of a decode worker for a clip, in seconds during which it computes or sleeps. A worker that exceeds
    it is killed and the sample is replaced. Clips that need longer at 25 million pixels per second, such as 4K, get
    that longer time."""

    @property
    def fixed_decoder(self) -> Literal["decord", "torchcodec", "pyav"]:
        """The decoder, which is decord for `auto` where nothing was measured."""
        return "decord" if self.decoder == "auto" else self.decoder

    cache: str | None = None
    """Folder for verified copies of remote shards. Not needed for local shards."""

    cache_gib: float = Field(default=100.0, gt=0)
    """Maximum size of the cache folder, in GiB."""
