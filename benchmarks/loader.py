"""The loader against the bare decoder and against V-JEPA 2's own loader, on the same content.

    python benchmarks/loader.py --videos DIR --work DIR [--rounds 5] [--seconds 15]
    VJEPA2_REFERENCE=path/to/vjepa2 python benchmarks/loader.py ...     # a clone of facebookresearch/vjepa2

`--videos` holds loose files (720p, to compare with a training set as it is downloaded). They are sharded once with
`vjepa shard`, and copied once to 340x256 with x264's default groups of 250 frames. Then every method runs in a process
of its own, all methods in every round, in random order, so that other work on the machine slows all alike. The
medians over rounds are printed. 16 frames at 4 fps, crops of 256 px, two workers (decoding processes).
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FRAMES, FPS, PX, WORKERS, BATCH = 16, 4, 256, 2, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--only", nargs="*", choices=[*METHODS], help="methods to run")
    parser.add_argument(
        "--cost", type=int, metavar="CLIPS", help="only CPU time, clip by clip, which a busy machine disturbs less"
    )
    parser.add_argument("--one", choices=[*METHODS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(METHODS[args.one](args), args.seconds)))
        return
    prepare(args)
    if args.cost:
        cost(args, args.cost)
        return
    names = [n for n in args.only or METHODS if not n.startswith("reference") or "VJEPA2_REFERENCE" in os.environ]
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in random.sample(names, len(names)):
            command = [sys.executable, __file__, "--videos", args.videos, "--work", args.work, "--one", name]
            done = subprocess.run([*command, "--seconds", str(args.seconds)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name:24}", results[name][-1], file=sys.stderr)
    print(f"{'method':24} {'clips/s':>8} {'CPU-ms/clip':>12}   (medians of {args.rounds} rounds)")
    for name, rows in results.items():
        rate, cpu_ms = (statistics.median(r[k] for r in rows) for k in ("clips_per_s", "cpu_ms"))
        print(f"{name:24} {rate:8.1f} {cpu_ms:12.1f}")


def prepare(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "shards" / "manifest.json").exists():
        vjepa = [sys.executable, "-m", "vjepa", "shard", args.videos, "--out", args.work / "shards"]
        subprocess.run(vjepa, check=True)
    (args.work / "gop250").mkdir(exist_ok=True)
    for source in sorted(args.videos.iterdir()):
        target = args.work / "gop250" / f"{source.stem}.mp4"
        if not target.exists():
            how = ["-vf", "scale=340:256", "-c:v", "libx264", "-crf", "23", "-g", "250", "-pix_fmt", "yuv420p", "-an"]
            subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-i", source, *how, target], check=True)


def measure(clips: Iterator[int], seconds: float) -> dict:
    """Take clips for some seconds after the first few. Count them and the CPU time of all processes."""
    from vjepa_data.reader.bench import cpu_seconds, descendants

    for _ in range(3 * WORKERS):
        next(clips)
    pids = descendants(os.getpid()) | {os.getpid()}
    began, cpu, count = time.perf_counter(), cpu_seconds(pids), 0
    while time.perf_counter() - began < seconds:
        count += next(clips)
    wall, cpu = time.perf_counter() - began, cpu_seconds(pids) - cpu
    return {"clips_per_s": round(count / wall, 2), "cpu_ms": round(cpu * 1000 / count, 2)}


def ours(decoder: str) -> Callable[[argparse.Namespace], Iterator[int]]:
    def clips(args: argparse.Namespace) -> Iterator[int]:
        from vjepa_data.reader.loader import ClipLoader
        from vjepa_data.settings import Clip, Crop, Data, Loader, Source

        sources = (Source(shards=str(args.work / "shards")),)
        data = Data(sources=sources, clip=Clip(frames=FRAMES, fps=FPS), crop=Crop(px=PX))
        loader = Loader(workers=WORKERS, decoder=decoder)  # pyright: ignore[reportArgumentType]
        with ClipLoader(data, loader, seed=0, batch_size=BATCH) as batches:
            for batch in batches:
                yield len(batch)

    return clips


def bare(args: argparse.Namespace) -> Iterator[int]:
    """Decode the clips of the same plan with decord in a loop, in as many processes as the loader has workers.

    They have the bytes in memory. Like decode workers they import no torch, with which decord takes a quarter longer.
    """
    import multiprocessing

    from vjepa_data.reader.pipeline import choose, index_of, open_plan
    from vjepa_data.settings import Clip, Crop, Data, Source

    sources = (Source(shards=str(args.work / "shards")),)
    data = Data(sources=sources, clip=Clip(frames=FRAMES, fps=FPS), crop=Crop(px=PX))
    plan = open_plan(data, seed=0, batch_size=BATCH)
    chosen: list[list[tuple]] = [[] for _ in range(WORKERS)]
    for number in range(64 * WORKERS):
        step, slot = divmod(number, BATCH)
        draw = plan.draw(step, slot)
        index, i = index_of(plan, draw), draw.sample
        facts = (int(index.frames[i]), int(index.width[i]), int(index.height[i]))
        look = choose(plan, data.crop, draw, step=step, slot=slot).times
        chosen[number % WORKERS].append((index.read(i).video, look.frames, facts))
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    for clips in chosen:
        context.Process(target=decode_for_ever, args=(clips, done), daemon=True).start()
    while True:
        yield done.get()


def decode_for_ever(clips: list[tuple], done: Any) -> None:
    from vjepa_data.decoding.backends import Expect, decode

    while True:
        for video, frames, facts in clips:
            decode(video, frames, backend="decord", expect=Expect(*facts))
            done.put(1)


def reference(folder: str) -> Callable[[argparse.Namespace], Iterator[int]]:
    """V-JEPA 2's VideoDataset with its transforms, settings of its ViT-L pretraining, in a plain DataLoader."""

    def clips(args: argparse.Namespace) -> Iterator[int]:
        import torch

        dataset = reference_dataset(args, folder)
        order = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
        loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, sampler=order, num_workers=WORKERS)
        for (buffer,), _, _ in loader:
            yield len(buffer)

    return clips


def reference_dataset(args: argparse.Namespace, folder: str) -> Any:
    from reference import reference as clone

    with clone():
        transforms, videos = map(importlib.import_module, ("app.vjepa.transforms", "src.datasets.video_dataset"))
    files = sorted((args.videos if folder == "videos" else args.work / folder).iterdir())
    table = args.work / f"{folder}.csv"
    table.write_text("".join(f"{f} 0\n" for f in files))
    transform = transforms.make_transforms(crop_size=PX, random_resize_aspect_ratio=(0.75, 1.35))
    settings: dict = {"frames_per_clip": FRAMES, "fps": FPS, "frame_step": None, "transform": transform}
    return videos.VideoDataset([str(table)], **settings)


def cost(args: argparse.Namespace, clips: int) -> None:
    """Take clip after clip through each method in turn, in this process and a decode worker, and compare CPU time."""
    import torch

    from vjepa_data.decoding.backends import Expect, decode
    from vjepa_data.decoding.decode_worker import DecodeWorker
    from vjepa_data.reader import crops
    from vjepa_data.reader.bench import cpu_seconds
    from vjepa_data.reader.pipeline import choose, index_of, open_plan
    from vjepa_data.settings import Clip, Crop, Data, Source

    torch.set_num_threads(1)
    sources = (Source(shards=str(args.work / "shards")),)
    data = Data(sources=sources, clip=Clip(frames=FRAMES, fps=FPS), crop=Crop(px=PX))
    plan, worker = open_plan(data, seed=0, batch_size=BATCH), DecodeWorker()
    row = torch.empty(FRAMES, PX, PX, 3, dtype=torch.uint8)
    methods: dict[str, Callable[[int, int], object]] = {}

    def drawn(step: int, slot: int):
        draw = plan.draw(step, slot)
        index, i = index_of(plan, draw), draw.sample
        choice = choose(plan, data.crop, draw, step=step, slot=slot)
        return index.read(i).video, choice, Expect(int(index.frames[i]), int(index.width[i]), int(index.height[i]))

    def ours(step: int, slot: int) -> None:
        video, choice, expect = drawn(step, slot)
        row.copy_(crops.cut_out(worker.decode(video, choice.times.frames, expect), choice.box, PX))

    def bare(step: int, slot: int) -> None:
        video, choice, expect = prepared[step, slot]
        decode(video, choice.times.frames, backend="decord", expect=expect)

    prepared = {(n // BATCH, n % BATCH): drawn(n // BATCH, n % BATCH) for n in range(clips)}
    methods |= {"ours, all of it": ours, "bare decord": bare}
    if "VJEPA2_REFERENCE" in os.environ:
        for folder in ("videos", "gop250"):
            dataset = reference_dataset(args, folder)
            methods[f"reference, {folder}"] = lambda step, slot, d=dataset: d[(step * BATCH + slot) % len(d)]
    spent: dict[str, list[float]] = {name: [] for name in methods}
    pids = {os.getpid(), worker.pid}
    for n in range(clips):
        for name in random.sample(list(methods), len(methods)):
            before = cpu_seconds(pids)
            methods[name](n // BATCH, n % BATCH)
            spent[name].append((cpu_seconds(pids) - before) * 1000)
    worker.close()
    print(f"{'method':24} {'CPU-ms/clip':>12}   (means of {clips} clips, interleaved)")
    for name, values in spent.items():
        mean, times = statistics.fmean(values), statistics.fmean(values) / statistics.fmean(spent["bare decord"])
        print(f"{name:24} {mean:12.1f}   x {times:.2f}")


METHODS: dict[str, Callable[[argparse.Namespace], Iterator[int]]] = {
    "ours": ours("decord"),
    "ours with pyav": ours("pyav"),
    "bare decord": bare,
    "reference, 720p": reference("videos"),
    "reference, 340x256": reference("gop250"),
}


if __name__ == "__main__":
    main()
