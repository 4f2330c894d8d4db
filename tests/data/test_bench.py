from pathlib import Path

import pytest

from vjepa_data.reader.bench import describe, measure_rate, measure_stages
from vjepa_data.settings import BadInput, Clip, Crop, Data, Loader, Source


def test_each_stage_of_a_clip_has_a_cost(corpus: Path):
    data = Data(sources=(Source(shards=str(corpus)),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    stages = measure_stages(data, Loader(), seed=0, batch_size=8, clips=60)
    assert 0 < stages.plan < 20
    assert stages.decode > stages.read > 0
    assert 0.001 < stages.megabytes < 1
    rate = measure_rate(data, Loader(workers=1), seed=0, batch_size=8, seconds=1.0, demand=40)
    assert 0 < rate.clips_per_s < 50
    assert rate.cpu_ms > 0
    text = describe(stages, rate, demand=40)
    assert "loader.workers=1: " in text
    assert "at 40 clips/s a step waits" in text
    assert "set loader.workers=1, and give them as many cores, for 40 clips/s with 1.3x" in text


def test_unreadable_samples_are_skipped_unless_all_are(videos, make_corpus, tmp_path: Path):
    """If all samples are unreadable, the benchmark says so."""
    facts = {"frames": 48, "fps": 12.0, "width": 96, "height": 64}
    for name, bad in [("some", [3]), ("all", range(8))]:
        samples = [{"key": f"k{i}", "video": b"noise" if i in bad else videos[0], **facts} for i in range(8)]
        data = Data(sources=(Source(shards=str(make_corpus(tmp_path / name, [samples]))),), clip=Clip(frames=4, fps=4))
        if name == "some":
            assert measure_stages(data, Loader(), seed=0, batch_size=8, clips=20).decode > 0
        else:
            with pytest.raises(BadInput, match=r"140 of 140 samples are unreadable; check"):
                measure_stages(data, Loader(), seed=0, batch_size=8, clips=20)
