"""Links of the pages and the reading order of docs/architecture.md lead somewhere."""

import re

import pytest
from pages import ROOT

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"))
]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_of_a_page_leads_to_a_file(page: str) -> None:
    targets = [target for target in LINK.findall((ROOT / page).read_text()) if "://" not in target]
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).is_file()]
    assert not missing, f"{page} links to files that do not exist: {missing}"


def test_a_clip_reaches_the_loss_in_ten_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split("## From a shard to the loss in ten files")[1].split("##")[0]
    assert len(LINK.findall(section)) == 10
