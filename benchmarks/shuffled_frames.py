"""Shuffle the frames of films in time: the control of a result that is said to come from the order of events.

    python benchmarks/shuffled_frames.py films/possible --out shuffled [--seed 0]

Every film keeps its frames and its name, and its frames come in an order that is drawn for it. Train the same recipe on
the shuffled films, and evaluate on films in order.
"""

import argparse
from pathlib import Path

import av
import numpy as np

from vjepa_data.rng import generator
from vjepa_data.synthetic.physics import write_video


def shuffle_films(films: Path, out: Path, seed: int) -> int:
    """Write each mp4 of a folder with its frames shuffled, and return their number."""
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(films.glob("*.mp4"))
    for number, path in enumerate(paths):
        with av.open(str(path)) as container:
            fps = container.streams.video[0].average_rate
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert fps is not None
        order = generator(seed, "shuffled frames", number).permutation(len(frames))
        write_video(out / path.name, frames[order], fps=round(fps))
    return len(paths)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("films", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        f"{arguments.out}: {shuffle_films(arguments.films, arguments.out, arguments.seed)} films with shuffled frames"
    )
