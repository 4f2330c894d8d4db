"""Measure the memory of an export, in units of the weights that it writes.

    python benchmarks/export_memory.py --encoder vit_large --ranks 4

Writes a checkpoint of an untrained model from several ranks, each parameter cut among them as FSDP2 cuts it, optimizer
moments included. Then exports it in a separate process for each format, and prints the growth of its anonymous memory
since its imports. Pages of files do not count, since the system may drop them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPORT = """
import json, resource, sys, threading, time
from pathlib import Path
import torch, transformers
from transformers.models.vjepa2 import modeling_vjepa2
from vjepa.export.export import export

def anonymous_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

before, peak, done = anonymous_mb(), 0.0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous_mb())
thread = threading.Thread(target=watch)
thread.start()
export(Path(sys.argv[1]), Path(sys.argv[2]), format=sys.argv[3])
done.set()
thread.join()
print(json.dumps({"before_mb": before, "peak_mb": peak}))
"""

# One rank: it draws whole parameters in turn, keeps its rows of each, and saves them with the rows of all other ranks.
RANK = """
import os, sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from vjepa import config
from vjepa.distributed.world import join
from vjepa.weights.import_checkpoint import run_for_weights
from vjepa.weights.save_imported import initial_metadata
from vjepa.weights.weights import expected_shapes
from vjepa.checkpoints.manager import CheckpointManager
model = config.Model.model_validate({"encoder": sys.argv[2]})
run = run_for_weights(model, px=64, frames=2, fps=4.0, kinds=2)
tensors = {}
with join(run.parallel) as world:
    mesh = dist.device_mesh.init_device_mesh("cpu", (world.size,))
    for number, (name, shape) in enumerate(expected_shapes(model, 2).items()):
        draw = torch.Generator().manual_seed(number)
        part, _, rest = name.partition(".")
        for whose in (name, f"target.{rest}") if part == "encoder" else (name,):
            whole = torch.randn(shape, generator=draw) * 0.02
            tensors[whose] = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.{moment}.{name}"] = torch.zeros_like(tensors[name])
    CheckpointManager(Path(sys.argv[1]), config.Checkpoint(), world).save(tensors, initial_metadata(run, "benchmark"))
"""


def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_large")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--place", type=Path, help="folder for the files, on a disk with room (default: a temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        run, rank = Path(place) / "run", Path(place) / "rank.py"
        rank.write_text(RANK)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        subprocess.run([*torchrun, rank, run, args.encoder], check=True)
        for form in ("native", "hf"):
            out, began = Path(place) / form, time.monotonic()
            done = subprocess.run([sys.executable, "-c", EXPORT, run, out, form], check=True, stdout=subprocess.PIPE)
            found = json.loads(done.stdout.splitlines()[-1])
            weights_mb = (out / "model.safetensors").stat().st_size / 2**20
            ratio = (found["peak_mb"] - found["before_mb"]) / weights_mb
            seconds = time.monotonic() - began
            print(
                f"{args.encoder} {form}: weights {weights_mb:.0f} MB, peak {ratio:.2f} of that, {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
