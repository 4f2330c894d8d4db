"""Add an evaluation from outside of the package: does a clip retrieve the other clip of its video?

    python examples/custom_evaluation.py MODEL CORPUS [RESULT.json]

A settings class, a function, a registry line. The shell loads the model, adds the baselines and writes the file.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field

from vjepa.evals.base import Baselines, EvaluationContext, EvaluationSettings, Result, ScoreRow
from vjepa.evals.features import clips_for, read_features
from vjepa.evals.registry import EVALUATIONS, EvaluationEntry
from vjepa.evals.shell import run_evaluation
from vjepa.weights.world_model import WorldModel


class RetrievalSettings(EvaluationSettings):
    """Settings of clip retrieval."""

    clips_per_video: int = Field(default=2, ge=2)
    """Clips of each video, evenly spaced."""

    def wanted_baselines(self) -> Baselines:
        """Ask for an untrained encoder and for pixels."""
        return Baselines(untrained_seeds=(self.seed,), pixels=True)


def evaluate(model: WorldModel, data: Path, settings: RetrievalSettings, context: EvaluationContext) -> Result:
    """Return the share of clips whose nearest other clip comes from the same video."""
    encoders = context.encoders(model)
    clips = clips_for(
        model, data, split=settings.split, per_video=settings.clips_per_video, max_videos=settings.max_videos
    )
    read = read_features(encoders, data, clips, context, pooling="clip", tokens=False)
    video = torch.from_numpy(read.videos)
    rows = []
    for name, encoded in read.features.items():
        features = F.normalize(encoded.pooled - encoded.pooled.mean(0), dim=1)
        cosines = (features @ features.T).fill_diagonal_(-torch.inf)
        share = (video[cosines.argmax(1)] == video).float().mean().item()
        rows.append(ScoreRow.accuracy("same video", name, share, clips.videos))
    protocol = {"corpus": str(data), "split": settings.split, "clips_per_video": settings.clips_per_video}
    return Result(protocol, rows)


EVALUATIONS["retrieval"] = EvaluationEntry(  # the one registry line
    __name__, "RetrievalSettings", "share of clips whose nearest clip comes from the same video", "Clip retrieval"
)


def main(model: Path, corpus: Path, out: Path | None = None) -> Result:
    """Evaluate a model on the train split of a corpus and print a line for each encoder."""
    result = run_evaluation("retrieval", model, corpus, {"split": "train"}, out=out)
    for row in result.rows:
        print(f"{row.features}: {row.value:.2f} [{row.low:.2f} {row.high:.2f}]")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
