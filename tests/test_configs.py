"""Every shipped run file reads, says what it follows, and states its command."""

from pathlib import Path

import pytest

from vjepa.config import load, shipped_configs

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.yaml"))


def test_configs_are_found_by_name() -> None:
    assert set(FILES) <= set(shipped_configs())
    assert load("demo").settings.name == "demo"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_reads_and_tells_its_command(path: Path) -> None:
    run = load(path).settings
    assert run.name == path.stem
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Run:", "Cost:", "Expect:"):
        assert word in head, f"{path.name}: the comment at the top lacks a line `# {word} ...`"
