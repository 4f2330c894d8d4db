"""Run the doctor on every node of a cluster in a single job, and compare the nodes."""

import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vjepa_launch import history, job_control, submit
from vjepa_launch.atomic import read_json, write_json
from vjepa_launch.doctor.machine import Finding, Measure
from vjepa_launch.process_info import ProcessInfo
from vjepa_launch.request import Request
from vjepa_launch.settings import Cluster, Restart

log = logging.getLogger(__name__)

POLL_S = 1.0


def examine_cluster(folder: Path, cluster: Cluster, command: Sequence[str], *, config: str) -> dict[str, list[Finding]]:
    """Run a command on every node, as a job of the size of a run, and wait for its end.

    Args:
        folder: folder of the job and its reports: absolute, on a disk that all nodes share.
        cluster: the cluster to examine.
        command: command of each rank. The first rank of each node calls `report`.
        config: text for FOLDER/config.yaml, which the command may read.

    Returns:
        The findings by node. A node without a report has a single bad finding.
    """
    once = cluster.model_copy(update={"restart": Restart(attempts=1)})
    launched = submit.launch(Request(folder, once, command, config=config, name="doctor", makes_steps=False))
    log.info("job %s examines %d nodes; its output is in %s", launched.job, cluster.nodes, launched.log)
    while job_control.is_alive(cluster.executor, launched.job):
        time.sleep(POLL_S)
    findings = {
        path.stem: [_load_finding(values) for values in read_json(path)]
        for path in sorted((folder / "nodes").glob("*.json"))
    }
    log_file = history.log_path(folder, 0)
    starts = history.read_events(folder, "start")
    for node in starts[-1]["nodes"] if starts else ():
        findings.setdefault(node, [Finding("report", "bad", f"missing; see {log_file}")])
    return findings or {"no node": [Finding("report", "bad", f"the job did not start; see {log_file}")]}


def report(folder: Path, findings: Sequence[Finding]) -> None:
    """Store the findings of this node."""
    node = ProcessInfo.from_environment().node
    write_json(folder / "nodes" / f"{node}.json", [asdict(finding) for finding in findings])


def compare(nodes: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return a finding for each subject, and a finding for each node that is bad or differs from the rest."""
    compared = []
    for subject in dict.fromkeys(finding.subject for findings in nodes.values() for finding in findings):
        found = {node: item for node, findings in nodes.items() for item in findings if item.subject == subject}
        measures = {node: item.measure for node, item in found.items() if item.measure}
        usual, _ = Counter(item.result for item in found.values()).most_common(1)[0]
        if measures:
            median = statistics.median(measure.value for measure in measures.values())
            odd = {node for node, measure in measures.items() if measure.value < measure.least * median}
        else:
            odd = {node for node, item in found.items() if item.result != usual}
        odd |= {node for node, item in found.items() if item.level == "bad"}
        typical = [measure for node, measure in measures.items() if node not in odd]
        if typical:
            values = [measure.value for measure in typical]
            usual = f"{min(values):,.4g} to {max(values):,.4g} {typical[0].unit}"
        if len(odd) < len(found):
            count = len(found) - len(odd)
            compared.append(Finding(subject, "ok", f"{count} node{'s' if count > 1 else ''}: {usual}"))
        for node in sorted(odd):
            item = found[node]
            level = "bad" if item.level == "bad" else item.measure.outlier if item.measure else "note"
            compared.append(Finding(subject, level, f"{node}: {item.result}"))
        absent = sorted(set(nodes) - set(found))
        if absent:
            compared.append(Finding(subject, "note", f"not on {', '.join(absent)}"))
    return compared


def _load_finding(values: dict[str, Any]) -> Finding:
    measure = values.pop("measure")
    return Finding(**values, measure=Measure(**measure) if measure else None)
