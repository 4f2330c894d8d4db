"""Measure the speed, memory and reliability of the dataset builder, for data/README.md.

    python benchmarks/builder.py throughput [--videos DIR]   against bare ffmpeg doing the same transcode
    python benchmarks/builder.py decode [--videos DIR]       clips of our form against a key frame every 250
    python benchmarks/builder.py kill --times 10             kill -9 at random moments, four builders at once
    python benchmarks/builder.py memory --clips 5000         resident memory of builder and children over a long build
    python benchmarks/builder.py fixtures                    200 inputs, every kind of odd and damaged file

Needs the ffmpeg command. Without --videos it makes its own: 720p, 10 s, 30 fps, moving texture with grain. On a shared
machine read the CPU seconds (user and system, all processes), not the wall clock. Methods take turns within each round.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import pyarrow.parquet as pq
from odd_files import X264, ffmpeg, make_odd_files
from rich.console import Console

from vjepa_data.builder import shard
from vjepa_data.builder.status import read_status
from vjepa_data.builder.verify import verify
from vjepa_data.config_files import load_settings
from vjepa_data.corpus.format import read_manifest
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.media.canonical import read_canonical
from vjepa_data.media.transcode import transcode
from vjepa_data.media.video import SUFFIXES
from vjepa_data.spec import Encode, Filter, Spec

QUIET = Console(file=io.StringIO())


def spec(*overrides: str) -> Spec:
    return load_settings(Spec, None, overrides).settings


def cpu_s() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def make_videos(folder: Path, count: int, *, seconds: int = 10) -> list[Path]:
    folder.mkdir(parents=True)
    for number in range(count):
        picture = f"mandelbrot=size=1280x720:rate=30:start_scale={3 / (number + 1)},noise=alls=8:allf=t"
        form = ["-c:v", "libx264", "-preset", "veryfast", "-g", "250", "-pix_fmt", "yuv420p", "-t", str(seconds)]
        ffmpeg("-f", "lavfi", "-i", picture, *form, folder / f"{number}.mp4")
    return sorted(folder.iterdir())


def videos_of(args: argparse.Namespace, work: Path, count: int) -> Path:
    if args.videos is None:
        make_videos(work / "videos", count)
        return work / "videos"
    folder = work / "videos"
    folder.mkdir()
    for path in args.videos.iterdir():
        if path.suffix in SUFFIXES:
            shutil.copy(path, folder)
    return folder


BARE = """-map 0:v:0 -an -sn -dn -map_metadata -1 -pix_fmt yuv420p -c:v libx264 -preset veryfast -crf 23 -g 12
    -keyint_min 12 -sc_threshold 0 -tune fastdecode -x264-params mbtree=0 -threads 1 -filter_threads 1
    -movflags +faststart -fflags +bitexact -f mp4""".split()  # noqa: SIM905
SCALE = "scale='if(lt(iw,ih),256,-2)':'if(lt(iw,ih),-2,256)':flags=bicubic+accurate_rnd+bitexact"


def throughput(args: argparse.Namespace, work: Path) -> None:
    """The builder, start to manifest, against ffmpeg alone: as many processes, same files, same encoder settings."""
    folder = videos_of(args, work, args.clips)
    for path in list(folder.iterdir()):
        for number in range(1, args.copies):
            (folder / f"{number}-{path.name}").hardlink_to(path)
    paths = sorted(folder.iterdir())

    def bare(path: Path) -> None:
        ffmpeg("-threads", "1", "-i", path, "-vf", SCALE, *BARE, work / f"bare-{path.name}")

    results: dict[str, list[tuple[float, float]]] = {"ffmpeg": [], "builder": []}
    checks, encodes = [], []
    for number in range(args.rounds):
        for name in random.sample(sorted(results), 2):
            begin, before = time.monotonic(), cpu_s()
            if name == "ffmpeg":
                with ThreadPoolExecutor(args.workers) as pool:
                    list(pool.map(bare, paths))
            else:
                out = work / f"out-{number}"
                shard([str(folder)], out, spec=spec("dedupe.exact=false"), workers=args.workers, console=QUIET)
                tally = read_status(out).builders[0].tally
                checks.append(tally.check_s)
                encodes.append(tally.encode_s)
            results[name].append((time.monotonic() - begin, cpu_s() - before))
            print(
                f"round {number} {name}: {results[name][-1][0]:.1f} s wall, {results[name][-1][1]:.1f} CPU-s",
                flush=True,
            )
    wall, cpu = (
        {name: statistics.median(run[column] for run in runs) for name, runs in results.items()} for column in (0, 1)
    )
    print(f"{len(paths)} videos, {args.workers} workers, medians of {args.rounds} rounds")
    for name in results:
        print(f"  {name:8} {wall[name]:6.1f} s wall  {cpu[name]:6.1f} CPU-s  {cpu[name] / len(paths):.3f} CPU-s a clip")
    unchecked = wall["builder"] - statistics.median(checks) / args.workers
    print(
        f"  throughput against bare ffmpeg: {wall['ffmpeg'] / unchecked:.2f}x by the clock without checking, "
        f"{wall['ffmpeg'] / wall['builder']:.2f}x with it ({cpu['ffmpeg'] / cpu['builder']:.2f}x by CPU)\n"
        f"  checking costs {statistics.median(checks) / statistics.median(encodes):.1%} of encoding; encoding "
        f"alone is {cpu['ffmpeg'] / statistics.median(encodes):.2f}x the throughput of bare ffmpeg by CPU"
    )


def decode_cost(args: argparse.Namespace, work: Path) -> None:
    """CPU to decode 16 frames, 4 apart: stored clips against the same at a key frame every 250, x264's defaults."""
    folder = videos_of(args, work, args.clips)
    costs: dict[str, list[float]] = {"stored": [], "gop 250": []}
    sizes: dict[str, int] = dict.fromkeys(costs, 0)
    clips = []
    for path in sorted(folder.iterdir()):
        ours = transcode(path, start_s=None, end_s=None, encode=Encode(), accept=Filter())
        ffmpeg(
            "-i",
            path,
            "-vf",
            SCALE,
            "-an",
            "-c:v",
            "libx264",
            "-crf",
            "23",
            "-g",
            "250",
            "-pix_fmt",
            "yuv420p",
            "-r",
            str(ours.stored.fps),
            work / "long.mp4",
        )
        theirs = (work / "long.mp4").read_bytes()
        with av.open(io.BytesIO(theirs), "r") as container:
            frames = container.streams.video[0].frames
        form = (ours.stored.width, ours.stored.height)
        clips.append(
            {"stored": (ours.data, Expect(ours.stored.frames, *form)), "gop 250": (theirs, Expect(frames, *form))}
        )
        for name, (data, _) in clips[-1].items():
            sizes[name] += len(data)
    draw = random.Random(0)
    for _ in range(args.rounds):
        for clip in clips:
            start = draw.random()
            for name in draw.sample(sorted(costs), 2):
                data, expect = clip[name]
                first = int(start * max(1, expect.frames - 61))
                begin = time.process_time()
                decode(
                    data, [min(first + 4 * n, expect.frames - 1) for n in range(16)], backend="decord", expect=expect
                )
                costs[name].append(time.process_time() - begin)
    median = {name: 1e3 * statistics.median(values) for name, values in costs.items()}
    mean = {name: 1e3 * statistics.mean(values) for name, values in costs.items()}
    for name in costs:
        print(
            f"{name:8} {mean[name]:6.1f} CPU-ms mean, {median[name]:6.1f} median, "
            f"{sizes[name] / 1e3 / len(clips):.0f} kB a clip"
        )
    print(
        f"stored clips cost {mean['stored'] / mean['gop 250']:.2f}x to decode and "
        f"{sizes['stored'] / sizes['gop 250']:.2f}x to keep"
    )


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "report.html" and p.parent.name != "status")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


SMALL = ["encode.short_side_px=64", "encode.preset=ultrafast", "shard_samples=4"]


def small_videos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        picture = f"mandelbrot=size=160x96:rate=15:start_scale={3 / (number + 1)}"
        ffmpeg(
            "-f",
            "lavfi",
            "-i",
            picture,
            "-t",
            "2",
            "-c:v",
            "libx264",
            "-preset",
            "ultrafast",
            folder / f"{number:04d}.mp4",
        )
    return folder


def kill(args: argparse.Namespace, work: Path) -> None:
    """Compare builds that are killed repeatedly, alone and four at once, with an undisturbed build."""
    folder = small_videos(work / "videos", 40)
    shard([str(folder)], work / "peace", spec=spec(*SMALL), workers=2, console=QUIET)
    wanted = digests(work / "peace")
    code = (
        "import sys; from pathlib import Path; from vjepa_data.builder import shard;"
        "from vjepa_data.spec import Spec;"
        "from vjepa_data.config_files import load_settings;"
        "shard([sys.argv[1]], Path(sys.argv[2]), spec=load_settings(Spec, None, sys.argv[3:]).settings, workers=2)"
    )
    kills = 0
    for builders in (1, 4):
        for attempt in range(args.times):
            out = work / f"killed-{builders}-{attempt}"
            words = [sys.executable, "-c", code, str(folder), str(out), *SMALL]
            draw = random.Random(100 * builders + attempt)
            while not (out / "report.html").exists():
                running = [
                    subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    for _ in range(builders)
                ]
                time.sleep(draw.uniform(0.5, args.longest_s))
                for victim in running:
                    if victim.poll() is None and draw.random() < 0.8:
                        children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
                        target = int(draw.choice([str(victim.pid), *children]))
                        os.kill(target, signal.SIGKILL)
                        kills += 1
                for one in running:
                    one.wait()
            same = digests(out) == wanted
            verdict = "the same bytes" if same else "DIFFERENT"
            print(f"{builders} at once, attempt {attempt}: {verdict}, {kills} kills so far", flush=True)
            if not same:
                raise SystemExit(1)
            shutil.rmtree(out)


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def memory(args: argparse.Namespace, work: Path) -> None:
    """Resident memory of the builder and its children while many clips are built."""
    folder = small_videos(work / "videos", 50)
    lines = ["path,start_s,end_s,n"]
    lines += [f"{n % 50:04d}.mp4,{(n // 50) * 1e-4:.4f},{1 + (n // 50) * 1e-4:.4f},{n}" for n in range(args.clips)]
    (folder / "table.csv").write_text("\n".join(lines))
    code = (
        "import sys; from pathlib import Path; from vjepa_data.builder import shard;"
        "from vjepa_data.spec import Spec;"
        "from vjepa_data.config_files import load_settings;"
        "shard([sys.argv[1]], Path(sys.argv[2]), spec=load_settings(Spec, None, sys.argv[3:]).settings, workers=2)"
    )
    words = [sys.executable, "-c", code, str(folder / "table.csv"), str(work / "out"), "shard_samples=250", *SMALL[:2]]
    builder = subprocess.Popen([*words, "dedupe.exact=false"], stdout=subprocess.DEVNULL)
    last = -1
    while builder.poll() is None:
        time.sleep(1)
        done = len(list((work / "out" / "shards").glob("*.json"))) if (work / "out").exists() else 0
        if done != last and done % 4 == 0:
            last = done
            children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
            sizes = ", ".join(f"{resident_mb(int(child)):.0f}" for child in children)
            print(f"{done * 250:6} clips: builder {resident_mb(builder.pid):.0f} MB, children {sizes} MB", flush=True)
    print(f"exit code {builder.returncode}; {read_manifest(work / 'out').splits}")


def fixtures(args: argparse.Namespace, work: Path) -> None:
    """200 inputs, good, odd and damaged: each meets its fate, and whatever is stored is canonical."""
    folder = work / "in"
    folder.mkdir()
    fates = make_odd_files(folder, work)
    number = 0
    while len(list(folder.iterdir())) < 200:  # the rest: parts of different looks, each a file of its own
        number += 1
        picture = f"mandelbrot=size=192x108:rate=15:start_scale={3 / number}"
        ffmpeg("-f", "lavfi", "-i", picture, "-t", "1", *X264, folder / f"plain-{number:03d}.mp4")
        fates[f"plain-{number:03d}.mp4"] = "15 frames"
    for name in ("one", "two"):
        shard([str(folder)], work / name, spec=spec("dedupe.exact=false"), workers=args.workers, console=QUIET)
    problems = list(verify(work / "one", deep=True, workers=args.workers).problems)
    if digests(work / "one") != digests(work / "two"):
        problems.append("two builds differ")
    rows = pq.read_table(work / "one" / "samples.parquet").to_pylist()
    found = {row["source"]: row["reason"] for row in pq.read_table(work / "one" / "rejects.parquet").to_pylist()}
    found |= {row["group"]: f"{row['frames']} frames" for row in rows}
    problems += [
        f"{name}: {found.get(f'in/{name}')}, expected {fate}"
        for name, fate in fates.items()
        if found.get(f"in/{name}") != fate
    ]
    decoders = ["decord", "pyav", *(["torchcodec"] if importlib.util.find_spec("torchcodec") else [])]
    problems += [
        f"{row['group']}: decoders disagree" for row in rows if not decoders_agree(work / "one", row, decoders)
    ]
    for name, fate in sorted(fates.items()):
        if "plain" not in name:
            print(f"  {name:16} {fate}")
    print(
        f"{len(fates)} inputs, built twice; {len(rows)} stored clips, each canonical, 5 frames of each alike with "
        f"{', '.join(decoders)}; {len(fates) - len(rows)} refused; {len(problems)} problems"
    )
    print("\n".join(problems))
    raise SystemExit(1 if problems else 0)


def decoders_agree(out: Path, row: dict, decoders: list[str]) -> bool:
    """Return whether a stored clip has the canonical form and all decoders give the same pixels of five frames."""
    data = (out / read_manifest(out).shards[row["shard"]].file).read_bytes()[row["video_offset"] :][: row["video_size"]]
    stored = read_canonical(data, gop=12)
    expect = Expect(row["frames"], row["width"], row["height"])
    numbers = sorted(random.Random(row["key"]).sample(range(row["frames"]), min(5, row["frames"])))
    pictures = [decode(data, numbers, backend=backend, expect=expect) for backend in decoders]
    return stored.frames == row["frames"] and all((one == pictures[0]).all() for one in pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = {"throughput": throughput, "decode": decode_cost, "kill": kill, "memory": memory, "fixtures": fixtures}
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--copies", type=int, default=1, help="of each video, for a longer build")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--longest-s", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        verbs[args.verb](args, Path(folder))


if __name__ == "__main__":
    main()
