"""Blocks are compiled once for each network, whatever the masks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vjepa.config import Run

MakeRun = Callable[..., Run]

BALANCED = [{"mode": "balanced", "blocks": count, "block_share": share} for count, share in ((2, 0.15), (1, 0.5))]
REFERENCE = {"mode": "reference", "blocks": 2, "spatial_scale": [0.1, 0.5], "batch": 2}


def test_blocks_are_compiled_once_whatever_the_masks(tiny_run: MakeRun, tmp_path: Path) -> None:
    def job(masks: list[dict[str, object]], batch_size: int, backend: str, steps: int = 50) -> dict[str, object]:
        run = tiny_run(batch_size=batch_size, objective={"masks": masks}, parallel={"compile": True})
        return {"settings": run.model_dump(mode="json"), "steps": steps, "backend": backend}

    jobs = {
        "fixed": job(BALANCED, 8, "sdpa"),
        "grouped by rank": job([{**REFERENCE, "groups": 4}], 8, "sdpa", steps=200),
        "neighbours": job([REFERENCE], 32, "varlen"),  # eight masks on a rank, and as many runs as they have lengths
    }
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("compiled_shapes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, file], capture_output=True, text=True, check=False, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    graphs = json.loads(done.stdout.splitlines()[-1])
    assert set(graphs["fixed"]) == {3}  # target, encoder, predictor
    for counts in graphs.values():
        assert counts[20] == counts[-1] <= 12
