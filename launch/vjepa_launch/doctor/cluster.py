"""The doctor on every node of a cluster: one job, a report from each node, and what stands out among them."""

import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vjepa_launch import history, job_control, process_info, status, submit
from vjepa_launch.doctor.machine import Finding, Measure
from vjepa_launch.request import Request
from vjepa_launch.settings import Cluster, Restart

log = logging.getLogger(__name__)

POLL_S = 1.0


def examine_cluster(folder: Path, cluster: Cluster, command: Sequence[str], *, config: str) -> dict[str, list[Finding]]:
    """Have a command report from every node, as a job of the size of a run; waits for its end.

    Args:
        folder: for the job and the reports, absolute, on a disk that all nodes share.
        cluster: where.
        command: what each rank executes; one rank of each node calls `report`.
        config: text for FOLDER/config.yaml, which the command may read.

    Returns:
        What was found on each node; a node that did not report has one bad finding.
    """
    once = cluster.model_copy(update={"restart": Restart(attempts=1)})
    launched = submit.launch(Request(folder, once, command, config=config, name="doctor", makes_steps=False))
    log.info("job %s visits %d nodes; its output is in %s", launched.job, cluster.nodes, launched.log)
    while job_control.is_alive(cluster.executor, launched.job):
        time.sleep(POLL_S)
    found = {
        path.stem: [_finding(one) for one in json.loads(path.read_text())]
        for path in sorted(_reports(folder).glob("*.json"))
    }
    for node in _nodes(folder):
        found.setdefault(node, [Finding("report", "bad", f"none; see {status.log_path(folder, 0)}")])
    if not found:
        found["no node"] = [Finding("report", "bad", f"the job did not start; see {status.log_path(folder, 0)}")]
    return found


def report(folder: Path, findings: Sequence[Finding]) -> None:
    """Write down what was found on this node."""
    node = process_info.ProcessInfo.here().node
    path = _reports(folder) / f"{node}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps([asdict(finding) for finding in findings]))
    beside.replace(path)


def compare(nodes: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """One finding for each thing that was looked at, and one for each node that differs from the others."""
    compared = []
    for what in dict.fromkeys(finding.what for findings in nodes.values() for finding in findings):
        found = {node: one for node, findings in nodes.items() for one in findings if one.what == what}
        measures = {node: one.measure for node, one in found.items() if one.measure}
        same, _ = Counter(one.found for one in found.values()).most_common(1)[0]
        if measures:
            median = statistics.median(measure.value for measure in measures.values())
            odd = {node for node, measure in measures.items() if measure.value < measure.least * median}
        else:
            odd = {node for node, one in found.items() if one.found != same}
        odd |= {node for node, one in found.items() if one.level == "bad"}
        usual = [measure for node, measure in measures.items() if node not in odd]
        if usual:
            values = [measure.value for measure in usual]
            same = f"{min(values):,.4g} to {max(values):,.4g} {usual[0].unit}"
        if len(odd) < len(found):
            count = len(found) - len(odd)
            compared.append(Finding(what, "ok", f"{count} node{'s' if count > 1 else ''}: {same}"))
        for node in sorted(odd):
            one = found[node]
            level = "bad" if one.level == "bad" else one.measure.outlier if one.measure else "note"
            compared.append(Finding(what, level, f"{node}: {one.found}"))
        absent = sorted(set(nodes) - set(found))
        if absent:
            compared.append(Finding(what, "note", f"not on {', '.join(absent)}"))
    return compared


def _reports(folder: Path) -> Path:
    return folder / "nodes"


def _nodes(folder: Path) -> list[str]:
    starts = [event for event in history.read_events(folder) if event["event"] == "start"]
    return starts[-1]["nodes"] if starts else []


def _finding(values: dict[str, Any]) -> Finding:
    measure = values.pop("measure")
    return Finding(**values, measure=Measure(**measure) if measure else None)
