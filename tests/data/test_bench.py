from pathlib import Path

from vjepa_data.bench import describe, measure_rate, measure_stages
from vjepa_data.settings import Clip, Crop, Data, Loader, Source


def test_the_cost_of_a_clip_is_charged_to_its_stages(corpus: Path):
    data = Data(sources=(Source(shards=str(corpus)),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    stages = measure_stages(data, Loader(), seed=0, batch_size=8, clips=60)
    assert 0 < stages.plan < 20
    assert stages.decode > stages.read > 0
    assert 0.001 < stages.megabytes < 1
    rate = measure_rate(data, Loader(workers=1), seed=0, batch_size=8, seconds=1.0, demand=40)
    assert 0 < rate.clips_per_s < 50
    assert rate.cpu_ms > 0
    text = describe(stages, rate, demand=40)
    assert "1 workers: " in text
    assert "at 40 clips/s a step waits" in text
    assert "set loader.workers=1 for 40 clips/s" in text
