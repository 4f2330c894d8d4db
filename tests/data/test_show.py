from pathlib import Path

from vjepa_data.reader import show
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Clip, Crop, Data, Loader, Source


def test_the_described_stream_equals_that_of_the_loader(corpus: Path):
    data = Data(sources=(Source(shards=str(corpus)),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    with ClipLoader(data, Loader(workers=0), seed=3, batch_size=8, step=9) as loader:
        (clips,) = next(loader).groups
        fingerprint, rows = show.rows(data, seed=3, batch_size=8, step=9, slots=6)
        assert fingerprint == loader.plan.fingerprint
    assert tuple(r.key for r in rows) == clips.keys[:6]
    assert tuple(r.choice.times.start_s[0] for r in rows) == clips.start_s[:6]
    for row in rows:
        with open(row.url, "rb") as shard:
            shard.seek(row.offset)
            assert shard.read(12)[4:8] == b"ftyp"


def test_the_description_names_sample_time_and_crop(corpus: Path):
    data = Data(sources=(Source(shards=str(corpus)),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    text = show.stream(data, seed=3, batch_size=8, step=9, slots=2)
    assert text.count("slot ") == 2
    assert "step 9, the first 2 of 8 slots; plan " in text
    assert text.splitlines()[2].startswith("    bytes    from ")
    assert "scaled to 32" in text
