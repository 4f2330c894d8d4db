"""How much faster does a dynamics predictor train from cached features than through its frozen encoder?

    OMP_NUM_THREADS=1 python benchmarks/feature_cache.py --corpus SHARDS [--batches 4]

SHARDS is a corpus of `vjepa synthesize two_room`. The predictor is that of configs/dynamics_two_room.yaml, on encoders
of several sizes with random weights. A step is `prepare`, loss, backward and AdamW, in CPU milliseconds of one thread.
The loader's work is measured separately, since it is the same with and without a cache. Losses must be equal to the
bit.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vjepa.config import Run, load
from vjepa.methods.base import create_method
from vjepa.nn.encoder import Encoder
from vjepa.weights.tensors import write_safetensors
from vjepa_data.reader.batch import Batch
from vjepa_data.reader.loader import ClipLoader

ENCODERS = {
    "dynamics_two_room (32 x 1)": {"width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2},
    "ViT-Ti (192 x 12)": {"width": 192, "depth": 12, "heads": 3},
    "ViT-S (384 x 12)": {"width": 384, "depth": 12, "heads": 6},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        for name, size in ENCODERS.items():
            run = make_run(args.corpus, Path(work) / name.split()[0], size)
            batches, loader_ms = read(run, args.batches)
            print(f"{name}: loader {loader_ms:.0f} ms a step", flush=True)
            through, losses = measure(run, batches)
            cached = run.objective.model_copy(update={"feature_cache": str(Path(work) / "cache")})
            filled = run.model_copy(update={"objective": cached})
            cold, cold_losses = measure(filled, batches)
            warm, warm_losses = measure(filled, batches)
            assert losses == cold_losses == warm_losses, "losses differ"
            print(f"    through the encoder {through:.0f} ms, filling the cache {cold:.0f} ms, from it {warm:.0f} ms")
            with_loader = (through + loader_ms) / (warm + loader_ms)
            print(
                f"    {through / warm:.1f} times as fast, {with_loader:.1f} times with the loader in the same process"
            )


def make_run(corpus: Path, folder: Path, size: dict[str, int]) -> Run:
    """Write an encoder with random weights, and return the run that uses it."""
    encoder = json.dumps({"name": "custom", **size})
    settings = [f"data.sources=[{{shards: {corpus}}}]", f"objective.encoder={folder}", f"model.encoder={encoder}"]
    run = load("dynamics_two_room", settings).settings
    folder.mkdir()
    tensors = Encoder(run.model, seed=0).state_dict()
    write_safetensors(folder / "model.safetensors", ((f"encoder.{name}", value) for name, value in tensors.items()))
    return run


def read(run: Run, count: int) -> tuple[list[Batch], float]:
    """Return batches, and the CPU milliseconds that each took. Decoding in a child process counts."""
    settings = run.loader.model_copy(update={"workers": 0, "decoder": "pyav"})
    with ClipLoader(run.data, settings, seed=run.seed, batch_size=run.batch_size) as loader:
        next(loader)
        begin = time.perf_counter()
        batches = [next(loader) for _ in range(count)]
        return batches, 1000 * (time.perf_counter() - begin) / count


def measure(run: Run, batches: list[Batch]) -> tuple[float, list[float]]:
    """Return the median CPU milliseconds of a step, and the losses. The first step only warms up."""
    method = create_method(run)
    networks = method.build()
    optimizer = torch.optim.AdamW(networks["dynamics"].parameters(), lr=1e-3)
    times, losses = [], []
    for batch in (batches[0], *batches):
        begin = time.process_time()
        loss = method.loss(networks, method.prepare(batch, torch.device("cpu")), step=batch.step)
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.process_time() - begin))
        losses.append(loss.value.item())
    return statistics.median(times[1:]), losses


if __name__ == "__main__":
    main()
