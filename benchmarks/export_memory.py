"""How much memory an export takes, in units of the weights that it writes.

    python benchmarks/export_memory.py --encoder vit_base

Makes a checkpoint of an untrained model, exports it in a process of its own, once in each format, and prints that
process's highest anonymous memory (what is not a page of a file, which the system may drop) less what it had before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXPORT = """
import sys, threading, time, json
from pathlib import Path
import torch, transformers
from transformers.models.vjepa2 import modeling_vjepa2
from vjepa.release.export import export

def anonymous_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

before, peak, done = anonymous_mb(), 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_mb())
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
export(Path(sys.argv[1]), Path(sys.argv[2]), format=sys.argv[3])
done = True; thread.join()
print(json.dumps({"before_mb": before, "peak_mb": peak}))
"""

MAKE = """
import sys
from pathlib import Path
from vjepa import config
from vjepa.release.adopt import _save, _settings
from vjepa.model.encoder import Encoder
from vjepa.model.predictor import Predictor
model = config.Model(encoder=sys.argv[2])
run = _settings(model, px=64, frames=2, fps=4.0, kinds=2)
encoder = Encoder(model).state_dict()
parts = {"encoder": encoder, "target": encoder, "predictor": Predictor(model, 2).state_dict()}
_save(run, parts, Path(sys.argv[1]), Path("x"))
"""


def main() -> None:
    """Print one line for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base")
    encoder = parser.parse_args().encoder
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        subprocess.run([sys.executable, "-c", MAKE, run, encoder], check=True)
        for form in ("native", "hf"):
            out = Path(place) / form
            done = subprocess.run([sys.executable, "-c", EXPORT, run, out, form], check=True, stdout=subprocess.PIPE)
            found = json.loads(done.stdout.splitlines()[-1])
            weights_mb = (out / "model.safetensors").stat().st_size / 2**20
            ratio = (found["peak_mb"] - found["before_mb"]) / weights_mb
            print(f"{encoder} {form}: weights {weights_mb:.0f} MB, peak {ratio:.2f} times that", flush=True)


if __name__ == "__main__":
    main()
