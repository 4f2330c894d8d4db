"""Write the page of a run, a model or a corpus: a single HTML file under 5 MB, without scripts or links to files.

vjepa report runs/X                       a run: writes runs/X/report.html
vjepa report MODEL --clips VIDEOS...      an export or a checkpoint: writes MODEL/report.html
vjepa report SHARDS                       a corpus: writes SHARDS/report.html
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from vjepa.atomic import check_free, new_file
from vjepa.report.model import model_page
from vjepa.report.run import run_page
from vjepa_data.builder.report import report_corpus
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)


def report(
    source: Path,
    out: Path | None = None,
    *,
    clips: Sequence[Path] = (),
    results: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write the page of a run, a model or a corpus.

    Args:
        source: folder of the run, model or corpus.
        out: file to write. The default is `report.html` in the folder, where an earlier page is replaced.
        clips: videos whose features are shown. For models only.
        results: files that evaluations wrote. For models only.
        overwrite: replace a file at `out`.

    Returns:
        The path of the page.

    Raises:
        BadInput: the folder is none of these or damaged, or `out` exists.
    """
    path = out or source / "report.html"
    check_free(path, overwrite=overwrite or out is None)
    is_run, is_corpus = (source / "config.yaml").is_file(), (source / "manifest.json").is_file()
    is_model = any((source / name).is_file() for name in ("model.json", "config.json", "state.json"))
    if out is None and (source / "state.json").is_file():
        raise BadInput(f"{source} is a checkpoint and stays as it is; give the path of the page with --out")
    if (clips or results) and not is_model:
        raise BadInput(f"{source} is not a model; leave --clips and --results out")
    if is_corpus:
        text = report_corpus(source)
    elif is_run:
        text = run_page(source)
    elif is_model:
        text = model_page(source, clips=clips, results=results)
    else:
        raise BadInput(
            f"{source} is not a run (config.yaml), a model (model.json, config.json, state.json) or a corpus "
            "(manifest.json). Give such a folder."
        )
    with new_file(path, overwrite=True) as file:
        file.write_text(text)
    log.info("%s: %.1f MB", path, len(text) / 1e6)
    return path
