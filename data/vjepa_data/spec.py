"""Spec of a corpus of shards: every setting of `vjepa shard` that changes the stored bytes."""

import codecs
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from vjepa_data.settings import Settings, Share, without_unused
from vjepa_data.signal_spec import Name, SignalSpec, check_derived


class Columns(Settings):
    """Names of the columns of a table of videos (CSV, TSV, JSONL, parquet)."""

    path: str = "path"
    """Path of the video, relative to the folder of the table, or a URL. A text with braces is made from columns, such
    as `{youtube_id}_{time_start:06d}_{time_end:06d}.mp4` for Kinetics. In a parquet the column may hold the videos."""

    start: str = "start_s"
    """Start of the part to use, in seconds or as `h:m:s` (default: the start of the video)."""

    end: str = "end_s"
    """End of the part to use, in seconds or as `h:m:s` (default: the end of the video)."""

    group: str = "group"
    """Group of videos that must stay in the same split (same film, same person). Default: the video."""

    split: str = "split"
    """Split of the video (default: drawn from the group)."""

    labels: tuple[str, ...] | None = None
    """Columns to keep as labels (default: all other columns)."""

    types: dict[str, Literal["text", "int", "float", "bool", "json"]] = Field(default_factory=dict)
    """Types of label columns. Without an entry, values of CSV and TSV stay text, and values of other formats keep their
    type."""

    encoding: str | None = None
    """Encoding of tables, lists and captions, such as `cp1252` (default: UTF-8, or as the byte order mark says)."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str | None) -> str | None:
        if encoding is not None:
            try:
                codecs.lookup(encoding)
            except LookupError:
                raise ValueError("unknown encoding; use for example utf-8, utf-16, cp1252 or latin-1") from None
        return encoding

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: Any) -> dict[str, Any]:
        return without_unused(serialize(self), "types", "encoding")


class Encode(Settings):
    """The canonical form of a stored clip: H.264 yuv420p, constant rate, closed GOPs, no edit list, no audio."""

    short_side_px: int = Field(default=256, ge=16, le=2160, multiple_of=2)
    """Length of the shorter side of every stored clip. Smaller videos are enlarged."""

    crop_bars: bool = False
    """Crop black bars above and below, or left and right, if they are symmetric and constant in time."""

    max_fps: float = Field(default=30.0, gt=0)
    """Higher rates are divided by an integer (60 becomes 30, 50 becomes 25), so that motion stays even.

    A rate up to 10 % higher is kept, since telephones record 30.5 frames per second where they mean 30.
    """

    fps: float | None = Field(default=None, gt=0)
    """A single rate for all clips, if training never samples faster. 8 saves a third of the bytes."""

    gop: int = Field(default=12, ge=1)
    """Frames between key frames, which a decoder may have to decode to reach any frame."""

    crf: int = Field(default=23, ge=0, le=51)
    """Constant rate factor of x264. Lower values give higher quality and larger files."""

    jpeg_quality: int = Field(default=92, ge=1, le=100)
    """JPEG quality of stored images."""

    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "veryfast"
    """Speed preset of x264."""


class Filter(Settings):
    """Limits for videos and clips. Each rejected source has a reason code in `rejects.parquet`."""

    min_duration_s: float = Field(default=0.5, ge=0)
    """Shortest clip, in seconds."""

    max_duration_s: float | None = Field(default=None, gt=0)
    """Longest video, in seconds. Longer videos are rejected, not cut (see `cut`)."""

    min_short_side_px: int = Field(default=32, ge=1)
    """Smallest shorter side of the source."""

    max_aspect: float = Field(default=4.0, ge=1)
    """Largest ratio of the longer to the shorter side."""

    min_fps: float = Field(default=0.0, ge=0)
    """Lowest average frame rate of the source."""

    codecs: tuple[str, ...] | None = None
    """Accepted codecs, by FFmpeg's names (h264, hevc, vp9, ...). Default: every codec that can be decoded."""

    min_motion: float = Field(default=0.0, ge=0)
    """Smallest motion of a clip: mean absolute difference between frames a second apart, in grey levels of 255."""

    min_brightness: float = Field(default=0.0, ge=0, le=255)
    """Smallest brightness of a clip: mean luma, in grey levels of 255."""

    deny: str | None = None
    """Text file of sources (names as in `rejects.parquet`) or sha256 sums to exclude, one per line."""


class Cut(Settings):
    """Rules to cut a video into clips."""

    kind: Literal["none", "fixed", "scene"] = "none"
    """Entire videos, windows of `length_s`, or scenes (cut further to at most `length_s`)."""

    length_s: float = Field(default=10.0, gt=0)
    """Length of a window, and largest length of a scene, in seconds."""

    threshold: float = Field(default=10.0, gt=0, le=100)
    """Change from frame to frame that begins a new scene, in percent. Unit and default are from FFmpeg's `scdet`."""

    part_s: float | None = Field(default=None, gt=0)
    """Length of the virtual parts of whole videos (`kind=none`), in seconds. A run draws parts and reads their bytes
    alone. Default: a run draws and reads whole videos."""

    @model_validator(mode="after")
    def _parts_of_whole_videos(self) -> "Cut":
        if self.part_s is not None and self.kind != "none":
            raise ValueError(f"part_s divides whole videos, but kind is {self.kind}; set kind=none, or remove part_s")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: Any) -> dict[str, Any]:
        """Omit unused settings of later versions, so that such corpora keep their bytes and hashes."""
        return without_unused(serialize(self), "part_s")


class Dedupe(Settings):
    """Rules to drop copies. The first source in order of name is kept."""

    exact: bool = True
    """Drop videos with identical bytes."""

    perceptual_bits: int | None = Field(default=None, ge=0, le=64)
    """Drop videos of equal length whose perceptual hashes differ in at most this many bits of 64. Start with 4."""


class Split(Settings):
    """Selection of held-out groups. A group is never divided between splits."""

    val_share: Share = 0.0
    """Fraction of the groups in `val`, chosen by a hash of the group's name."""

    group: Literal["file", "folder"] = "file"
    """Group of a source that names no group: the video itself, or its folder."""

    salt: str = ""
    """Seed of the hash. Another salt selects other groups."""


class Spec(Settings):
    """Settings of a corpus of shards. The same sources and spec give the same bytes."""

    file_paths: ClassVar[tuple[str, ...]] = ("filter.deny",)
    """Settings that hold paths. A relative path counts from the folder of the file that names it, if it exists there,
    else from the working directory."""

    name: str = Field(default="videos", pattern=r"^[a-z0-9_-]{1,40}$")
    """Name of the corpus, and prefix of the names of shards and the keys of samples."""

    licence: str = ""
    """Licence of the sources, recorded in the manifest."""

    origin: str = ""
    """Origin of the sources, recorded in the manifest."""

    media: Literal["videos", "images"] = "videos"
    """Type of the sources. Images become samples of one frame, stored as `.jpg`."""

    mode: Literal["transcode", "copy"] = "transcode"
    """`copy` keeps canonical files unchanged, byte for byte, and encodes all other files."""

    columns: Columns = Columns()

    folder_label: str | None = None
    """Label that takes the name of the folder of each video, such as `class` for the folders of UCF-101."""

    filter: Filter = Filter()
    cut: Cut = Cut()
    dedupe: Dedupe = Dedupe()
    split: Split = Split()
    encode: Encode = Encode()

    signals: dict[Name, SignalSpec] = Field(default_factory=dict)
    """Numeric signals of each video, by name. `actions` comes from VIDEO.actions.npy or VIDEO.actions.csv."""

    camera: str | None = None
    """Camera of a robot's episodes, such as `observation.images.top` or `top`. Default: their only camera."""

    frames_hz: float | None = Field(default=None, gt=0)
    """Frames per second of pictures inside HDF5 files that do not state it."""

    texts: tuple[Name, ...] = ()
    """Texts of each video. `caption` comes from VIDEO.caption.txt."""

    shard_mb: float = Field(default=384.0, gt=0)
    """Largest size of a shard, in 10^6 bytes, estimated before encoding."""

    shard_samples: int = Field(default=1000, ge=1)
    """Largest number of samples in a shard."""

    max_rejects: Share = 1.0
    """Largest fraction of rejected sources. Above it the build fails."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds without progress after which a clip that is being read, encoded or checked is rejected."""

    @model_validator(mode="after")
    def _signals_need_videos(self) -> "Spec":
        if self.signals and self.media == "images":
            raise ValueError(
                f"signals ({', '.join(self.signals)}) need videos, but media is images; remove the signals"
            )
        check_derived(self.signals)
        if self.cut.part_s is not None and self.media == "images":
            raise ValueError("cut.part_s divides videos, but media is images; remove cut.part_s")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: Any) -> dict[str, Any]:
        """Omit unused settings of later versions, so that such corpora keep their bytes and hashes."""
        return without_unused(serialize(self), "camera", "frames_hz", "signals", "texts", "folder_label")
