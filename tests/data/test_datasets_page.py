"""Run every command of docs/datasets.md, in the order of the page, on a small folder."""

import io
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def test_the_commands_of_the_page_work(videos: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    for number, video in enumerate(videos):
        (tmp_path / "videos" / "sub" / f"{number}.mp4").write_bytes(video)
    (tmp_path / "videos" / "half.mp4").write_bytes(videos[0][:900])
    (tmp_path / "shards-of-others").mkdir()
    for name, video in (("0-train.tar", videos[0]), ("1-val.tar", videos[1])):
        with tarfile.open(tmp_path / "shards-of-others" / name, "w") as tar:
            header = tarfile.TarInfo("a.mp4")
            header.size = len(video)
            tar.addfile(header, io.BytesIO(video))

    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines() if line]
    assert {words[1] for words in commands} == {"shard", "verify", "index", "merge"}
    for words in commands:
        assert words[0] == "vjepa"
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        if words == shlex.split("vjepa shard videos --out corpus name=kitchen split.val_share=0.2"):
            assert ", rejected: 1 no_index; corpus " in done.stdout

    def rows(corpus: str, table: str = "samples") -> list[dict]:
        return pq.read_table(tmp_path / corpus / f"{table}.parquet").to_pylist()

    assert len(rows("corpus")) == len(videos)
    assert [row["reason"] for row in rows("corpus", "rejects")] == ["no_index"]
    assert (tmp_path / "corpus" / "report.html").exists()
    assert sorted(row["split"] for row in rows("admitted")) == ["train", "val"]
    assert len(rows("mended")) == 2
    assert "corpus: " in (tmp_path / "mixture.yaml").read_text()
    assert not (tmp_path / "big").exists()


def test_the_settings_of_the_page_exist(tmp_path: Path) -> None:
    from vjepa_data.config_files import load_settings
    from vjepa_data.spec import Spec

    [text] = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "build.yaml").write_text(text)
    assert load_settings(Spec, tmp_path / "build.yaml").settings.cut.kind == "scene"
    for name in re.findall(
        r"`((?:encode|cut|dedupe|mode|media|filter|split|max_rejects)[a-z_.]*=[^`]*)`", PAGE.read_text()
    ):
        if "..." not in name and "FILE" not in name:
            load_settings(Spec, None, [name])


def test_the_page_lists_every_reason() -> None:
    from vjepa_data.media.video import Reason

    words = set(re.findall(r"`([a-z_]+)`", PAGE.read_text()))
    assert {reason.value for reason in Reason} <= words
