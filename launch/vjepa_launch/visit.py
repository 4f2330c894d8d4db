"""The doctor on every node of a cluster: one job, a report from each node, and what stands out among them."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from vjepa_launch import jobs, place, record, status, submit
from vjepa_launch.doctor import Finding, Speed
from vjepa_launch.request import Request
from vjepa_launch.settings import Cluster, Restart

POLL_S = 1.0


def visit(folder: Path, cluster: Cluster, command: Sequence[str], *, config: str) -> dict[str, list[Finding]]:
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
    while jobs.is_alive(cluster.executor, launched.job):
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
    node = place.Place.here().node
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
        speeds = {node: one.speed for node, one in found.items() if one.speed}
        usual, _ = Counter(one.found for one in found.values()).most_common(1)[0]
        if speeds:
            values = [speed.value for speed in speeds.values()]
            median = statistics.median(values)
            unit = next(iter(speeds.values())).unit
            odd = {node for node, speed in speeds.items() if speed.value < speed.least * median}
            usual_values = [speed.value for node, speed in speeds.items() if node not in odd] or values
            same = f"{min(usual_values):,.0f} to {max(usual_values):,.0f} {unit}"
        else:
            same = usual
            odd = {node for node, one in found.items() if one.found != usual}
        odd |= {node for node, one in found.items() if one.level == "bad"}
        if len(odd) < len(found):
            compared.append(Finding(what, "ok", f"{len(found) - len(odd)} nodes: {same}"))
        for node in sorted(odd):
            one = found[node]
            level = "bad" if one.level == "bad" or one.speed else "note"
            compared.append(Finding(what, level, f"{node}: {one.found}"))
        absent = sorted(set(nodes) - set(found))
        if absent:
            compared.append(Finding(what, "note", f"not on {', '.join(absent)}"))
    return compared


def _reports(folder: Path) -> Path:
    return folder / "nodes"


def _nodes(folder: Path) -> list[str]:
    starts = [event for event in record.read_events(folder) if event["event"] == "start"]
    return starts[-1]["nodes"] if starts else []


def _finding(values: dict) -> Finding:
    speed = values.pop("speed")
    return Finding(**values, speed=Speed(**speed) if speed else None)
