"""Measure how long the processes of a node take to open the index of a large corpus, and the memory that it takes.

    python benchmarks/index.py --rows 10000000

Pages of a mapped file that two processes share count half for each (PSS). All other memory of a process is private.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vjepa_data.corpus.format import FORMAT, SAMPLE_COLUMNS, Manifest, ShardEntry


def measure(count: int, work: Path) -> None:
    write_rows(work / "corpus", count)
    code = (
        "import sys, time; from vjepa_data.corpus.index import Index; import numpy as np; begin = time.monotonic();"
        "index = Index(sys.argv[1]); took = time.monotonic() - begin; names = ('shard', 'frames', 'fps', 'width',"
        " 'height', 'video_offset', 'video_size', 'json_offset', 'json_size', 'xxh64');"
        "sums = [int(getattr(index, name).sum(dtype=np.float64)) for name in names];"
        "keys = [index.key(i) for i in range(0, len(index), 9999)]; print(f'{took:.3f}', flush=True); sys.stdin.read()"
    )

    def opened() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", code, str(work / "corpus")]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first = opened()
    assert first.stdout is not None
    took = first.stdout.readline().strip()
    first.communicate()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{count:,} rows: once, as a builder does at its end, they are mapped in {took} s, at {peak:.1f} GB at most")
    both = [opened() for _ in range(2)]
    for number, one in enumerate(both):
        assert one.stdout is not None
        print(f"  process {number} opens them in {one.stdout.readline().strip()} s, every column read to its end")
    pages = [smaps(one.pid) for one in both]
    for number, own in enumerate(pages):
        print(f"  process {number}: {', '.join(f'{name} {size:,.0f} MB' for name, size in own.items())}")
    print(f"  both together: PSS {sum(own['Pss'] for own in pages):,.0f} MB")
    for one in both:
        one.communicate()


def smaps(pid: int) -> dict[str, float]:
    """Return the memory of a process in MB: resident, proportional share, and private."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(rest.split()[0]) / 1e3 for name, _, rest in (line.partition(":") for line in lines)}
    return {"Rss": sizes["Rss"], "Pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def write_rows(folder: Path, count: int) -> None:
    """A corpus of rows without videos: shards of a thousand samples."""
    folder.mkdir()
    i = np.arange(count)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1 << 62, count)
    columns = {
        "key": pa.array([f"many-{n:016x}" for n in ids.tolist()]),
        "split": pa.array(["train"]).take(pa.array(np.zeros(count, np.int64))),
        "suffix": pa.array(["mp4"]).take(pa.array(np.zeros(count, np.int64))),
        "shard": i // 1000,
        "position": i % 1000,
        "video_offset": (i % 1000) * 451_072 + 1536,
        "video_size": rng.integers(300_000, 449_000, count),
        "json_offset": (i % 1000) * 451_072 + 512,
        "json_size": rng.integers(800, 900, count),
        "frames": rng.integers(100, 300, count),
        "fps": np.full(count, 30.0),
        "width": np.full(count, 456),
        "height": np.full(count, 256),
        "duration_s": np.full(count, 10.0),
        "group": pa.array([f"group-{n}" for n in (i // 10).tolist()]),
        "labels": pa.array(["{}"]).take(pa.array(np.zeros(count, np.int64))),
        "xxh64": pa.array([f"{n:016x}" for n in ids.tolist()]),
    }
    table = pa.table({name: columns[name] for name in SAMPLE_COLUMNS.names}).cast(SAMPLE_COLUMNS)
    pq.write_table(table, folder / "samples.parquet", compression="zstd", row_group_size=1 << 17)
    shards = tuple(ShardEntry(f"shards/{n:06d}.tar", "train", 451_072_000, "", 1000) for n in range(-(-count // 1000)))
    splits = {"train": {"samples": count, "shards": len(shards), "seconds": 10.0 * count}}
    manifest = Manifest(FORMAT, "many", {}, {}, shards, splits, "")
    (folder / "manifest.json").write_bytes(manifest.with_hash().as_json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args.rows, Path(folder))


if __name__ == "__main__":
    main()
