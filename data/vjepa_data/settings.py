"""What a stream of clips is made of. Never imports torch, so that a login node can read it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vjepa_data.errors import BadInput as BadInput


class Settings(BaseModel):
    """A frozen group of settings that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, in [0, 1]."""


class Source(Settings):
    """One corpus of shards and its part in the mixture."""

    shards: str
    """Folder or URL that holds `manifest.json`, as `vjepa shard` or `vjepa index` wrote it."""

    split: str = "train"
    """Which split of that corpus to read."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the stream's samples, relative to the other sources' weights."""

    frames: int | None = Field(default=None, ge=1)
    """Frames per clip from this source; by default those of `clip`."""

    fps: float | None = Field(default=None, gt=0)
    """Frames per second of video time from this source; by default those of `clip`."""

    frame_step: int | None = Field(default=None, ge=1)
    """In place of `fps`: every so many frames of the file, whatever its rate."""

    duration_s: float | None = Field(default=None, gt=0)
    """In place of `fps`: so many seconds of video time, over which the frames are spread evenly."""

    per_video: int | None = Field(default=None, ge=1)
    """Clips taken from a video of this source when its turn comes; by default those of `clip`."""

    corpus: str | None = None
    """Hash of the corpus that must lie there, as its manifest says; any by default. `vjepa merge` writes it."""

    licence: str = ""
    """Licence of the videos, for the record."""

    origin: str = ""
    """Where the videos come from, for the record."""

    without: str | None = None
    """File of keys never to draw, one a line; a `rejected.jsonl` of an earlier run will do. Changes the stream."""

    @model_validator(mode="after")
    def _one_pace(self) -> "Source":
        given = [name for name in ("fps", "frame_step", "duration_s") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say how fast a clip goes; keep one of them")
        return self


class Clip(Settings):
    """Where in time to look."""

    frames: int = Field(default=16, ge=1)
    """Frames per clip."""

    fps: float = Field(default=4.0, gt=0)
    """Frames per second of video time, not of the file. V-JEPA 2: 16 frames at 4 fps."""

    short: Literal["leave_out", "hold"] = "leave_out"
    """Videos that end before the clip does: never drawn, or drawn with their last frame held (V-JEPA 2; images too)."""

    per_video: int = Field(default=1, ge=1)
    """Clips taken from a video, one after another, when its turn comes: fewer bytes to read, less varied batches."""


class Crop(Settings):
    """Where in the picture to look: random resized crop and flip, on uint8 frames."""

    px: int = Field(default=256, ge=8)
    """Height and width of the crop that the model sees, in pixels."""

    scale: tuple[Share, Share] = (0.3, 1.0)
    """Smallest and largest area of the crop, as a share of the frame. V-JEPA 2: 0.3 to 1."""

    aspect: tuple[float, float] = (0.75, 1.35)
    """Smallest and largest width / height of the crop. V-JEPA 2: 0.75 to 1.35."""

    flip: Share = 0.5
    """Probability of a mirror image. Set 0 where left and right mean something."""

    @model_validator(mode="after")
    def _ordered(self) -> "Crop":
        for name in ("scale", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high, got [{low}, {high}]")
        return self


class Rejects(Settings):
    """How much bad data a run may meet before it stops and says so."""

    max_share: Share = 0.01
    """Largest share of rejected samples over the last 10,000 draws."""

    max_in_a_row: int = Field(default=100, ge=1)
    """Most rejected samples one after another."""


class Data(Settings):
    """Everything that decides which pixels fill which slot of which step."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Corpora to mix."""

    clip: Clip = Clip()
    crop: Crop = Crop()
    rejects: Rejects = Rejects()

    lanes: int | None = Field(default=None, ge=1)
    """Parallel cursors through an epoch; must divide the batch, and ranks must divide it. By default the
    largest number that the batch and the corpus allow, so that a run can go on with any number of ranks."""

    window_shards: int = Field(default=4, ge=1)
    """Shards among which a lane shuffles: more mixes better and reads from more places."""


class Loader(Settings):
    """How fast clips arrive. None of it changes which clips arrive."""

    workers: int = Field(default=2, ge=0)
    """Processes per rank that read, decode and crop; 0 does it in the training process."""

    prefetch_steps: int = Field(default=2, ge=1)
    """Batches that each worker keeps ready."""

    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"
    """How worker processes are started."""

    decoder: Literal["decord", "torchcodec", "pyav"] = "decord"
    """Who decodes. All agree bit for bit on the canonical form that `vjepa shard` writes."""

    crop_on: Literal["cpu", "device"] = "cpu"
    """Who scales what is cropped. The device spares the workers a twentieth of their time; in floats, which may differ
    from the CPU's result by one level of 255. On a CPU both are the same."""

    decode_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds, asleep or at work, after which a decoder that does not answer is killed and its sample replaced. Frames
    that at 25 million pixels a second would take longer, as of 4K, get that time."""

    cache: str | None = None
    """Folder for verified copies of remote shards; none is needed for local ones."""

    cache_gib: float = Field(default=100.0, gt=0)
    """Largest size of that folder, in GiB."""
