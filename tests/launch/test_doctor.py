"""The findings of the doctor, on a machine and compared between nodes."""

import functools
import os
from pathlib import Path

import pytest

from vjepa_launch.doctor import cluster, machine
from vjepa_launch.doctor.machine import Finding, Measure


def levels(findings: list[machine.Finding]) -> dict[str, str]:
    return {finding.subject: finding.level for finding in findings}


@pytest.fixture
def fast_torch_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the torch check, whose import is slow."""
    monkeypatch.setattr(machine, "TORCH", "print('2.13|13.0|2'); print('H100|700'); print('H100|698')")


@pytest.mark.usefixtures("fast_torch_check")
def test_the_doctor_checks_everything_and_leaves_no_files(tmp_path: Path) -> None:
    findings = machine.examine(tmp_path)
    assert {"python", "torch", "torch runs", "GPU 0", "shared memory", "disk", "clock", "SLURM"} <= set(
        levels(findings)
    )
    assert levels(findings)["disk"] in ("ok", "note")
    assert "H100, 700 TFLOP/s bf16" in machine.table(findings)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_slower_than_its_neighbours_is_bad() -> None:
    findings = machine._gpu_findings([["H100", "700"], ["H100", "500"]])
    assert levels(findings) == {"GPU 0": "ok", "GPU 1": "bad"}
    assert "the fastest on this machine reaches 700" in findings[1].result


def test_gpus_that_torch_does_not_see_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_count_devices", lambda: 8)
    (finding,) = machine._gpu_findings([])
    assert finding.level == "bad"
    assert "8 installed, but torch sees none" in finding.result


def test_a_torch_that_crashes_or_does_not_answer_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TORCH", "raise ImportError('libcudart.so.13 is missing')")
    assert machine._check_torch() == [machine.Finding("torch runs", "bad", "ImportError: libcudart.so.13 is missing")]
    monkeypatch.setattr(machine, "TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "TORCH_TIMEOUT_S", 0.2)
    assert "no answer" in machine._check_torch()[0].result


def test_an_unwritable_folder_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = machine._check_disk(tmp_path / "file")
    assert finding.level == "bad"


def test_nodes_that_differ_are_listed_by_name() -> None:
    def node(tflops: float, torch: str, disk: float) -> list[Finding]:
        return [
            Finding("torch", "ok", torch),
            Finding("GPU 0", "ok", f"H100, {tflops:.0f} TFLOP/s", Measure(tflops, "TFLOP/s", 0.9, "bad")),
            Finding("disk", "ok", f"{disk:.0f} MiB/s", Measure(disk, "MiB/s")),
        ]

    nodes = {"n1": node(700, "2.13", 900), "n2": node(690, "2.13", 500), "n3": node(510, "2.12", 800)}
    nodes["n4"] = [Finding("report", "bad", "none")]
    assert machine.table(cluster.compare(nodes)).splitlines() == [
        "ok    torch   2 nodes: 2.13",
        "note  torch   n3: 2.12",
        "note  torch   not on n4",
        "ok    GPU 0   2 nodes: 690 to 700 TFLOP/s",
        "bad   GPU 0   n3: H100, 510 TFLOP/s",
        "note  GPU 0   not on n4",
        "ok    disk    3 nodes: 500 to 900 MiB/s",
        "note  disk    not on n4",
        "bad   report  n4: none",
        "note  report  not on n1, n2, n3",
    ]


@pytest.mark.usefixtures("fast_torch_check")
def test_a_scheduler_that_does_not_answer_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nexec sleep 60\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine.slurm, "queued_jobs", functools.partial(machine.slurm.queued_jobs, timeout_s=0.2))
    (finding,) = machine._check_scheduler()
    assert finding.level == "bad"
    assert "did not answer within 0 s" in finding.result
