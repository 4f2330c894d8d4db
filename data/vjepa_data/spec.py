"""What a corpus of shards is made of: every choice of `vjepa shard` that changes the bytes."""

from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from vjepa_data.settings import Settings, Share
from vjepa_data.signal_spec import Name, SignalSpec


class Columns(Settings):
    """What the columns of a manifest (CSV, TSV, JSONL, parquet) are called."""

    path: str = "path"
    """Path of the video, relative to the manifest, or a URL."""

    start: str = "start_s"
    """Where the part to use begins, in seconds; the start of the video when empty or absent."""

    end: str = "end_s"
    """Where the part to use ends, in seconds; the end of the video when empty or absent."""

    group: str = "group"
    """Videos that must not be divided between splits (same film, same person); the video itself when absent."""

    split: str = "split"
    """The split that the video belongs to; drawn from the group when empty or absent."""

    labels: tuple[str, ...] | None = None
    """Columns to keep as labels; by default every column that has no other meaning."""


class Encode(Settings):
    """The canonical form of a stored clip: H.264 yuv420p, constant rate, closed GOPs, no edit list, no audio."""

    short_side_px: int = Field(default=256, ge=16, le=2160, multiple_of=2)
    """Length of the shorter side; smaller videos are enlarged, so that every stored clip has it."""

    crop_bars: bool = False
    """Cut off black bars above and below, or left and right, that are as wide on both sides all the time."""

    max_fps: float = Field(default=30.0, gt=0)
    """Faster videos are thinned by a whole number (60 becomes 30, 50 becomes 25), so that motion stays even."""

    fps: float | None = Field(default=None, gt=0)
    """One rate for all clips, when training will never sample faster: 8 saves a third of the bytes."""

    gop: int = Field(default=12, ge=1)
    """Frames from one key frame to the next: what a decoder must read to reach any frame."""

    crf: int = Field(default=23, ge=0, le=51)
    """x264's constant rate factor: lower is better and larger."""

    jpeg_quality: int = Field(default=92, ge=1, le=100)
    """Quality of stored images."""

    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "veryfast"
    """x264's effort."""


class Filter(Settings):
    """Which videos and clips are worth keeping. Each refusal has a reason code in `rejects.parquet`."""

    min_duration_s: float = Field(default=0.5, ge=0)
    """Shortest clip, in seconds."""

    max_duration_s: float | None = Field(default=None, gt=0)
    """Longest video, in seconds; longer ones are refused, not cut (see `cut`)."""

    min_short_side_px: int = Field(default=32, ge=1)
    """Smallest shorter side of the video as it is."""

    max_aspect: float = Field(default=4.0, ge=1)
    """Largest ratio of the longer to the shorter side."""

    min_fps: float = Field(default=0.0, ge=0)
    """Slowest average rate of the video as it is."""

    codecs: tuple[str, ...] | None = None
    """Codecs to accept, by FFmpeg's names (h264, hevc, vp9, ...); by default all that can be decoded."""

    min_motion: float = Field(default=0.0, ge=0)
    """Refuse still clips: smallest mean absolute difference between frames a second apart, in grey levels of 255."""

    min_brightness: float = Field(default=0.0, ge=0, le=255)
    """Refuse black clips: smallest mean luma, in grey levels of 255."""

    deny: str | None = None
    """Text file of sources (as in `samples.parquet`) or sha256 sums to leave out, one a line."""


class Cut(Settings):
    """How a video becomes clips."""

    kind: Literal["none", "fixed", "scene"] = "none"
    """Whole videos, windows of `length_s`, or scenes (cut again to at most `length_s`)."""

    length_s: float = Field(default=10.0, gt=0)
    """Length of a window, in seconds; of a scene, at most."""

    threshold: float = Field(default=10.0, gt=0, le=100)
    """How large a change from frame to frame begins a new scene, in percent: FFmpeg's `scdet`, whose default is 10."""


class Dedupe(Settings):
    """Which copies to drop. The first source, in order of name, stays."""

    exact: bool = True
    """Drop videos whose files are equal byte for byte."""

    perceptual_bits: int | None = Field(default=None, ge=0, le=64)
    """Drop videos of equal length whose perceptual hashes differ in at most this many bits of 64; 4 is a good start."""


class Split(Settings):
    """Which groups are held out. A group is never divided."""

    val_share: Share = 0.0
    """Share of the groups that go to `val`, chosen by a hash of the group's name."""

    group: Literal["file", "folder"] = "file"
    """What a group is where the source does not say: the video, or the folder that it lies in."""

    salt: str = ""
    """Changes which groups are chosen."""


class Spec(Settings):
    """A corpus of shards: what goes in, what comes out. The same sources and spec give the same bytes."""

    name: str = Field(default="videos", pattern=r"^[a-z0-9_-]{1,40}$")
    """Name of the corpus; begins the names of shards and the keys of samples."""

    licence: str = ""
    """Licence of the sources, kept in the manifest."""

    origin: str = ""
    """Where the sources come from, kept in the manifest."""

    media: Literal["videos", "images"] = "videos"
    """What the sources hold; images become samples of one frame, stored as `.jpg`."""

    mode: Literal["transcode", "copy"] = "transcode"
    """`copy` keeps files that already have the canonical form, byte for byte, and encodes the others."""

    columns: Columns = Columns()
    filter: Filter = Filter()
    cut: Cut = Cut()
    dedupe: Dedupe = Dedupe()
    split: Split = Split()
    encode: Encode = Encode()

    signals: dict[Name, SignalSpec] = Field(default_factory=dict)
    """Numeric signals of each video, by name. `actions` comes from VIDEO.actions.npy or VIDEO.actions.csv."""

    texts: tuple[Name, ...] = ()
    """Texts of each video. `caption` comes from VIDEO.caption.txt."""

    shard_mb: float = Field(default=384.0, gt=0)
    """Size at which a shard is full, in 10^6 bytes, judged before encoding."""

    shard_samples: int = Field(default=1000, ge=1)
    """Most samples in a shard."""

    max_rejects: Share = 1.0
    """Largest share of the sources that may be refused; above it the build fails."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a clip that is still being read, encoded or checked is refused."""

    @model_validator(mode="after")
    def _signals_need_videos(self) -> "Spec":
        if self.signals and self.media == "images":
            raise ValueError(
                f"signals ({', '.join(self.signals)}) need videos, but media is images; remove the signals"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: Any) -> dict[str, Any]:
        """Leave out signals and texts that are not used, so that such corpora keep their bytes and hashes."""
        values = serialize(self)
        return {name: value for name, value in values.items() if value or name not in ("signals", "texts")}
