"""Every objective learns on the generated physics corpus: from videos through the builder's shards to a probe.

The short tests train seconds, on small pictures. The long tests run the real verbs at the FLOPs of the table in
docs/objectives.md. They take minutes, so start them by hand: `pytest -m long tests/vjepa/test_learning.py`. The recipes
come from `benchmarks/objectives.py`.
"""

from pathlib import Path

import objectives
import pytest

from vjepa.demo import CORPUS
from vjepa.evals.results import read_result
from vjepa_data.builder.shard import shard
from vjepa_data.config_files import load_settings
from vjepa_data.spec import Spec
from vjepa_data.synthetic.physics import Rules, write_corpus

# One worker makes the corpus once for all.
pytestmark = [pytest.mark.xdist_group("learning"), pytest.mark.timeout(900)]

COST, SEED = 0.4, 0

# Of corpus and training in the short tests, whose settings were chosen on 0, 10 and 11. Only that `stills` and `barlow`
# needed more steps was seen on 1, where they had 0.031 and 0.049 to spare.
PX, SHORT_SEED = 32, 1

# Sizes vary more than in the demo, so that the area that is covered does not tell how many objects cover it.
RULES = Rules(size=(0.12, 0.34), gravity_share=0, pillar_share=0)
BUILD = ("name=physics", f"encode.short_side_px={PX}", "split.val_share=0.5")

SHORT = (
    f"data.crop.px={PX}",
    "model.encoder.width=64",
    "model.predictor.width=32",
    "batch_size=16",
    "loader.workers=0",
    "loader.decoder=pyav",  # half of decord's time for pictures as small as these
    "track.every_steps=100",
)
FOLLOW = ("optim.lr=2e-3", "optim.ema=0.99", "optim.final_ema=0.999")
VIEWS = ("optim.lr=3e-3", "objective.local_px=16")
# FLOPs as a share of the demo's (205 to 485 steps), and settings.
SHORT_RECIPES: dict[str, tuple[float, tuple[str, ...]]] = {
    "vjepa2": (0.034, FOLLOW),
    "vjepa2_1": (0.04, FOLLOW),
    "levjepa, sigreg": (0.017, VIEWS),
    "levjepa, vicreg": (0.017, VIEWS),
    "levjepa, barlow": (0.024, VIEWS),
    "stills": (0.018, ()),
}


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small physics")
    write_corpus(folder / "videos", videos=600, seed=SHORT_SEED, px=PX, seconds=1, rules=RULES)
    spec = load_settings(Spec, None, BUILD).settings
    shard([str(folder / "videos")], folder / "shards", spec=spec, workers=1)
    return folder / "shards"


@pytest.mark.parametrize("name", SHORT_RECIPES)
def test_in_seconds_it_learns_more_than_an_untrained_encoder_tells(
    name: str, small_shards: Path, tmp_path: Path
) -> None:
    """One object or two: accuracy on videos held out, above the best of three untrained encoders.

    Margins at seed 1: vjepa2 0.081, vjepa2_1 0.129, levjepa with sigreg 0.125, with vicreg 0.091, with barlow 0.118,
    stills 0.087 (0.207 at seed 2). 309 videos are held out because 116 were too few: vjepa2 had 0.004 there at seed
    10, and has 0.121 now. With a learning rate of nothing the margin is 0.
    """
    cost, settings = SHORT_RECIPES[name]
    recipe = objectives.recipe(name, small_shards, SHORT_SEED, cost, [*SHORT, *settings])
    run, result = tmp_path / "run", tmp_path / "probe.json"
    # Child processes: here the checks of signatures take as long as the training.
    objectives.vjepa("train", "demo", "--out", run, *recipe)
    probe = ("train_split=train", "labels=[objects]", "clips_per_video=2")
    objectives.vjepa("eval", "probe", run, small_shards, "--out", result, *probe)
    rows = {row.features: row for row in read_result(result).rows}
    assert rows["pretrained"].value > max(rows["random init"].extra["seeds"]) + 0.03


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("physics")
    objectives.vjepa("synthesize", "--out", folder / "videos", "--videos", "800")
    objectives.vjepa("shard", folder / "videos", "--out", folder / "shards", *CORPUS)
    return folder / "shards"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in objectives.RECIPES if name != "vjepa2, causal"])
def test_it_learns_more_than_an_untrained_encoder_at_full_size(name: str, shards: Path, tmp_path: Path) -> None:
    """One object or two: accuracy on held-out videos, above the best of three untrained encoders.

    Measured over seeds 0, 1, 2, least margin: vjepa2 0.131, vjepa2_1 0.136, levjepa with sigreg 0.146, with vicreg
    0.150, with barlow 0.136, stills 0.117. R2 of the centre: vjepa2 0.175, vjepa2_1 0.170, stills 0.325 above, while
    levjepa is below the untrained encoder and is not tested. Masks that hide the future need all of the demo's FLOPs to
    teach anything (docs/objectives.md). All six passed at commit 36c60a8, in 21 minutes of a busy machine.
    """
    settings = objectives.recipe(name, shards, SEED, COST, [])
    rows = objectives.one_run(tmp_path / "run", settings, shards)["rows"]
    asked = {"objects": 0.08} if name.startswith("levjepa") else {"objects": 0.08, "token centre": 0.1}
    for task, margin in asked.items():
        untrained = max(rows[task, "random init"]["seeds"])
        assert rows[task, "pretrained"]["value"] > untrained + margin, task
