"""Every kind of odd and damaged video file, made on the spot with the ffmpeg command."""

import random
import subprocess
from pathlib import Path

QUICK = ["-preset", "ultrafast"]
X264 = ["-c:v", "libx264", *QUICK]


def ffmpeg(*words: str | Path) -> None:
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, words)], check=True)


def make_odd_files(folder: Path, work: Path) -> dict[str, str]:
    """Make every kind of odd and damaged file, with the expected result: a reason, or a number of frames."""
    base = ["-f", "lavfi", "-i", "testsrc2=size=320x180:rate=25:duration=4"]
    good, long = work / "good.mp4", work / "long.mp4"
    ffmpeg(*base, *X264, "-g", "60", "-movflags", "+faststart", good)
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=320x180:rate=25:duration=12", *X264, "-g", "250", "-bf", "2", long)
    small = ["-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=1", "-c:v", "mpeg2video"]
    ffmpeg(*base, "-c:v", "mpeg2video", work / "a.ts")
    ffmpeg(*small, work / "b.ts")
    ffmpeg("-i", good, "-c", "copy", work / "good.mkv")
    kinds: dict[str, tuple[str, list[str | Path]]] = {
        "good.mp4": ("100 frames", [*base, *X264, "-g", "60"]),
        "edit_list.mp4": ("142 frames", ["-ss", "6.3", "-i", long, "-c", "copy"]),
        "stream.ts": ("100 frames", ["-i", good, "-c", "copy"]),
        "audio_only.mp4": ("no_video_stream", ["-f", "lavfi", "-i", "sine=duration=4", "-c:a", "aac"]),
        "vfr.mp4": ("100 frames", [*base, "-vf", "select='not(mod(n,5))+gt(n,60)'", "-fps_mode", "vfr", *X264]),
        "interlaced.mp4": ("50 frames", [*base, "-vf", "interlace", "-flags", "+ildct+ilme", *X264]),
        "one_frame.mp4": ("too_short", [*base, "-frames:v", "1", *X264]),
        "fps1.mp4": ("6 frames", ["-f", "lavfi", "-i", "testsrc2=size=320x180:rate=1:duration=6", *X264]),
        "hevc.mkv": (
            "100 frames",
            [*base, "-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none"],
        ),
        "vp9.webm": ("100 frames", [*base, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"]),
        "av1.mkv": ("25 frames", [*base, "-c:v", "libaom-av1", "-usage", "realtime", "-cpu-used", "8", "-t", "1"]),
        "xvid.avi": ("100 frames", [*base, "-c:v", "mpeg4", "-bf", "2"]),
        "tenbit.mp4": ("100 frames", [*base, *X264, "-pix_fmt", "yuv420p10le"]),
        "full.mp4": ("100 frames", [*base, *X264, "-pix_fmt", "yuvj444p"]),
        "loop.gif": ("25 frames", [*base, "-t", "1"]),
        "fast.mp4": ("60 frames", ["-f", "lavfi", "-i", "testsrc2=size=320x180:rate=60:duration=2", *X264]),
        "tall.mp4": ("too_narrow", ["-f", "lavfi", "-i", "testsrc2=size=64x320:rate=25:duration=1", *X264]),
        "tiny.mkv": ("too_small", ["-f", "lavfi", "-i", "testsrc2=size=24x24:rate=25:duration=1", *X264]),
    }
    for name, (_, words) in kinds.items():
        ffmpeg(*words, folder / name)
    data, cut, noise = good.read_bytes(), (work / "good.mkv").read_bytes(), random.Random(0)
    at = data.index(b"mdat") + 4
    flipped, hole = bytearray(data), bytearray(data)
    for _ in range(100):
        flipped[noise.randrange(at, len(data))] ^= 1 << noise.randrange(8)
    hole[at + 2000 : at + (len(data) - at) // 2] = bytes((len(data) - at) // 2 - 2000)
    damaged = {
        "rot90.mp4": ("100 frames", turned(data)),
        "res_change.ts": ("size_changes", (work / "a.ts").read_bytes() + (work / "b.ts").read_bytes()),
        "trunc50.mp4": ("damaged", data[: len(data) // 2]),
        "trunc50.mkv": ("truncated", cut[: len(cut) // 2]),
        "nomoov.mp4": ("no_index", data[: data.index(b"moov") - 4] + data[data.index(b"mdat") - 4 :]),
        "zero.mp4": ("empty", b""),
        "html.mp4": ("not_video", b"<html><body>503</body></html>"),
        "flip100.mp4": ("damaged", bytes(flipped)),
        "hole.mp4": ("damaged", bytes(hole)),
        "zeroed_head.mp4": ("not_video", bytes(1024) + data[1024:]),
        "list.mp4": ("not_video", f"#EXTM3U\n#EXTINF:3,\n{good}\n".encode()),
    }
    for name, (_, content) in damaged.items():
        (folder / name).write_bytes(content)
    return {name: fate for name, (fate, _) in [*kinds.items(), *damaged.items()]}


def turned(data: bytes) -> bytes:
    """Turn an MP4 by a quarter with another matrix in its track's header."""
    upright, quarter = (
        b"".join(n.to_bytes(4, signed=True) for n in matrix)
        for matrix in ((1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    )
    at = data.index(upright, data.index(b"tkhd"))
    return data[:at] + quarter + data[at + 36 :]
