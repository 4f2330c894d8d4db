"""Verbs for people who train: inspect settings, train here or on a cluster, follow runs."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vjepa.cli.app import Amount, Config, Count, Number, Settings, verb, verb_group
from vjepa.cli.cluster import Nodes, On, launch_array, load_profile, print_launched
from vjepa.progress import progress

if TYPE_CHECKING:
    from vjepa.config import Run

log = logging.getLogger(__name__)

RunFolder = Annotated[Path, Parameter(help="Run folder.")]


@verb("demo", example="demo --videos my/videos --out runs/mine steps=400")
def demo(
    *,
    out: Path = Path("runs/demo"),
    videos: Path | None = None,
    world: Literal["two_room"] | None = None,
    settings: Settings,
) -> int:
    """Run the complete pipeline on this machine, in minutes: videos, shards, training, export, probe, report.

    Args:
        out: Folder to work in.
        videos: Folder of your own videos, in place of generated physics scenes.
        world: Learn the effects of actions in this world instead, and plan in it.
    """
    from vjepa.demo import demo, demo_world
    from vjepa_data.errors import BadInput

    if world is not None:
        if videos is not None:
            raise BadInput("--world simulates its own films; leave --videos out")
        return demo_world(out, world, overrides=settings)

    return demo(out, videos=videos, overrides=settings)


@verb("show", example="show demo optim.lr=1e-3")
def show(
    config: Config,
    /,
    *,
    masks: Path | None = None,
    signals: Path | None = None,
    stream: Count | None = None,
    step: Number = 0,
    settings: Settings,
) -> None:
    """Print the resolved settings, and the source of each value.

    Args:
        masks: Picture to draw: the visible and hidden tokens of a step.
        signals: Picture to draw: the frames of the first slots with their actions and states, to see an off-by-one.
        stream: Print the sample, time and crop of the first so many slots instead.
        step: Step of the masks, the signals or the stream.
    """
    from vjepa.config import load
    from vjepa_data.config_files import flatten, one_line

    loaded = load(config, settings)
    run = loaded.settings
    if masks:
        from vjepa.viz.mask_plot import draw_mask_sheet

        draw_mask_sheet(run, masks, step=step)
        print(masks)
    if signals:
        from vjepa.viz.signal_plot import describe_lags, draw_signal_sheet

        draw_signal_sheet(run, signals, step=step)
        print("\n".join([str(signals), *describe_lags(run, step=step)]))
    if stream:
        from vjepa_data.reader.show import stream as show_stream

        print(show_stream(run.data, seed=run.seed, batch_size=run.batch_size, step=step, slots=stream))
    if not (masks or signals or stream):
        rows = [(name, one_line(value), loaded.origins[name]) for name, value in flatten(run)]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for name, value, origin in rows:
            print(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}")


@verb("estimate", example="estimate vitl16_256px_16f --nodes 16 parallel.recompute=full")
def estimate(
    config: Config,
    /,
    *,
    nodes: Count = 1,
    gpus_per_node: Count = 8,
    gpu: str = "h100",
    mfu: float = 0.4,
    network_gb_s: Amount | None = None,
    settings: Settings,
) -> None:
    """Estimate memory, FLOPs, communication and hours, before you queue.

    Args:
        nodes: Nodes of the job.
        gpus_per_node: GPUs of each node.
        gpu: a100, h100, h100-pcie, h100-nvl, h200, b200 or l40s.
        mfu: Share of the GPU's peak FLOPs that you reach.
        network_gb_s: GB/s of a GPU to other nodes, as `vjepa doctor` measures it, to get the seconds of a step on the
            network.
    """
    from vjepa.config import load
    from vjepa.estimate.estimate import ACCELERATORS, estimate
    from vjepa_data.errors import BadInput

    if gpu not in ACCELERATORS:
        raise BadInput(f"--gpu {gpu}: unknown GPU; choose from {', '.join(ACCELERATORS)}")
    run = load(config, settings).settings
    gpus, kind = nodes * gpus_per_node, ACCELERATORS[gpu]
    print(estimate(run, gpus=gpus, accelerator=kind, mfu=mfu, per_node=gpus_per_node, network_gb_s=network_gb_s).text())


@verb("rehearse", example="rehearse vitg16_256px_16f --ranks 1024 parallel.replicate=auto")
def rehearse(
    config: Config,
    /,
    *,
    ranks: Count,
    per_node: Count = 8,
    clips: Count = 100_000_000,
    out: Path | None = None,
    settings: Settings,
) -> None:
    """Rehearse the start of a run on many pretended ranks, and print seconds, bytes and sockets of a rank.

    Args:
        ranks: Number of pretended ranks.
        per_node: Ranks of each node.
        clips: Clips of the pretended corpus, if the shards of the run are missing.
        out: JSON file to write the numbers to.
    """
    from vjepa.config import load
    from vjepa.engine.rehearsal import rehearse

    rehearsal = rehearse(load(config, settings).settings, ranks=ranks, per_node=per_node, clips=clips)
    if out is not None:
        out.write_text(rehearsal.json() + "\n")
    print(rehearsal.text())


@verb("train", example="train demo --out runs/demo steps=100")
def train(config: Config, /, *, out: Path | None = None, settings: Settings) -> int:
    """Train in this process, or in any number of processes under torchrun.

    Args:
        out: Run folder. By default runs/NAME. A run that exists is continued.
    """
    from vjepa.config import load
    from vjepa.engine.open_files import allow_open_files

    run = load(config, settings).settings
    allow_open_files(run.loader.workers, ranks=int(os.environ.get("WORLD_SIZE", 1)))
    if os.environ.get("RANK", "0") == "0":
        log.info("starting %s; loading torch takes a while", run.name)
    from vjepa.engine.trainer import train
    from vjepa.monitoring.health import Collapsed, Unhealthy

    try:
        return train(run, out or Path("runs") / run.name)
    except (Unhealthy, Collapsed) as error:
        print(f"vjepa train: {error}", file=sys.stderr)
        return 1


@verb("launch", example="launch vitl16_256px_16f --on h100 --nodes 16 --dry-run")
def launch(
    config: Config,
    /,
    *,
    on: On,
    nodes: Nodes | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    refreeze: bool = False,
    replace_settings: bool = False,
    settings: Settings,
) -> None:
    """Train on a cluster through submitit, or on this machine in the background.

    Args:
        config: A run file, the name of a shipped run file, or a sweep file.
        out: Run folder. By default runs/NAME. A run that exists is continued.
        dry_run: Print the submission without writing anything.
        refreeze: Use the present code, though the run has its own copy.
        replace_settings: Use these settings, though the run has its own.
    """
    from vjepa.config import load
    from vjepa_data.config_files import dump_settings, load_settings
    from vjepa_launch import array, submit, sweep
    from vjepa_launch.request import Request, train_command

    profile = load_profile(on, nodes)
    ranks = profile.nodes * profile.ranks_per_node
    if is_sweep(Path(config)):
        plan = load_settings(sweep.Sweep, Path(config), settings).settings
        folder = (out or Path("runs") / plan.name).resolve()
        elements = [
            array.Element(
                variant.name,
                tuple(train_command(folder / variant.name)),
                dump_settings(_runnable(load(plan.config, variant.overrides).settings, ranks)),
            )
            for variant in sweep.expand(plan)
        ]
        variants = array.Array(
            folder, profile, elements, name=plan.name, at_once=plan.at_once, refreeze=refreeze,
            replace_settings=replace_settings,
        )  # fmt: skip
        launch_array(variants, dry_run=dry_run)
        return
    run = _runnable(load(config, settings).settings, ranks)
    folder = (out or Path("runs") / run.name).resolve()
    request = Request(
        folder, profile, train_command(folder), config=dump_settings(run), name=run.name, refreeze=refreeze,
        replace_settings=replace_settings,
    )  # fmt: skip
    done = submit.done_at(request)
    if dry_run:
        print(submit.describe(request), end="")
    elif done:
        print(f"nothing to launch: {folder} is done at step {done}; more steps=... and --replace-settings continue it")
    else:
        print_launched(submit.launch(request))


def _runnable(run: "Run", ranks: int) -> "Run":
    """Return a run as a job must see it, in any working folder, after checks that would else fail after the queue."""
    run.check_ranks(ranks)
    return run.with_absolute_paths()


def is_sweep(path: Path) -> bool:
    """Return whether a YAML file is a sweep: only sweeps name the run file that they start from."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # the error is reported when the file is read as a run file
    return isinstance(values, dict) and "config" in values


verb_group("runs", "List, follow and stop the runs on this machine or cluster.")


@verb("runs list", example="runs list --root runs")
def runs_list(*, root: Path = Path("runs")) -> None:
    """List runs, each on a line.

    Args:
        root: Folder of run folders.
    """
    from rich.console import Console

    from vjepa_launch import status

    statuses, warning = status.read_all(status.find_runs(root))
    console = Console()
    # A cell may wrap on a terminal. In a file each run takes a single line, and nothing is cut off.
    console.width = max(console.width, 120) if console.is_terminal else 1000
    console.print(status.table(statuses) if statuses else f"no runs under {root}")
    if warning:
        print(warning)


@verb("runs show", example="runs show runs/demo")
def runs_show(run: RunFolder, /) -> None:
    """Show the state of a run: attempts, nodes, and the cause of each end."""
    from vjepa_launch import status

    print(status.describe(run))


@verb("runs logs", example="runs logs runs/demo --rank 7 -f")
def runs_logs(
    run: RunFolder,
    /,
    *,
    rank: Number = 0,
    lines: Annotated[Count, Parameter(alias="-n")] = 100,
    follow: Annotated[bool, Parameter(alias="-f")] = False,
) -> None:
    """Print the log of a rank.

    Args:
        rank: Rank to read.
        lines: Lines to print, from the end.
        follow: Keep printing new lines.
    """
    from vjepa_launch import status

    for text in status.read_log(run, rank=rank, lines=lines, follow=follow):
        print(text, end="", flush=True)


@verb("runs cancel", example="runs cancel runs/demo --after-checkpoint")
def runs_cancel(run: RunFolder, /, *, after_checkpoint: bool = False) -> None:
    """End a run for good.

    Args:
        after_checkpoint: Save a checkpoint first, however long it takes.
    """
    from vjepa_launch import status

    print(status.cancel(run, after_checkpoint=after_checkpoint))


@verb("runs requeue", example="runs requeue runs/demo")
def runs_requeue(run: RunFolder, /) -> None:
    """Save a checkpoint and requeue the job. A run that has ended is launched again."""
    from vjepa_launch import status, submit

    text = status.requeue(run)
    if text:
        print(text)
    else:
        print_launched(submit.launch_again(run))


@verb("doctor", example="doctor demo --on slurm")
def doctor(
    config: Config | None = None,
    /,
    *,
    folder: Path = Path("runs"),
    on: On | None = None,
    nodes: Nodes | None = None,
    visit: Annotated[Path | None, Parameter(show=False)] = None,
    settings: Settings,
) -> int:
    """Check whether a run would work on this machine, or on every node of a cluster.

    Args:
        config: A run, whose shards are read and decoded.
        folder: Folder where runs are kept.
        on: Check and compare every node of this profile: a file, or a name.
        visit: Result folder of a rank in a job that --on has started.
    """
    from vjepa.config import load
    from vjepa_data.config_files import dump_settings
    from vjepa_launch.doctor import cluster
    from vjepa_launch.doctor.machine import examine, table

    run = load(config, settings).settings if config else None
    if on:
        folder = (folder / "doctor" / time.strftime("%Y%m%d-%H%M%S")).resolve()
        about = [str(folder / "config.yaml")] if run else []
        command = ["python", "-m", "vjepa", "doctor", *about, "--visit", str(folder)]
        run_file = dump_settings(run.with_absolute_paths()) if run else "name: doctor\n"
        with progress("checking nodes"):
            found = cluster.examine_cluster(folder, load_profile(on, nodes), command, config=run_file)
        findings = cluster.compare(found)
    else:
        from vjepa import doctor

        if visit is None:
            with progress("checking this machine"):
                findings = examine(folder, doctor.checks(run))
        else:
            findings = examine(visit, doctor.checks(run)) if os.environ["LOCAL_RANK"] == "0" else []
            findings += doctor.check_exchange_between_ranks()
            if os.environ["LOCAL_RANK"] == "0":
                cluster.report(visit, findings)
            return 0
    print(table(findings))
    return 1 if any(finding.level == "bad" for finding in findings) else 0


verb_group("bench", "Measure speed on this machine.")


@verb("bench loader", example="bench loader demo --demand 93")
def bench_loader(
    config: Config, /, *, demand: Amount | None = None, seconds: Amount = 20.0, settings: Settings
) -> None:
    """Measure clips per second of the loader, and the cost of each stage.

    Args:
        demand: Clips per second that a GPU takes: also print how long it would wait.
        seconds: Duration of the measurement.
    """
    from vjepa.config import load
    from vjepa_data.reader import bench

    run = load(config, settings).settings
    of_run = {"seed": run.seed, "batch_size": run.batch_size}
    with progress("measuring the loader"):
        stages = bench.measure_stages(run.data, run.loader, **of_run)
        rate = bench.measure_rate(run.data, run.loader, **of_run, seconds=seconds, demand=demand)
    print(bench.describe(stages, rate, demand))


@verb("drill", example="drill --on local --only kill-first")
def drill(
    *,
    on: On,
    nodes: Nodes | None = None,
    only: tuple[str, ...] = (),
    out: Path = Path("runs/drill"),
    at_once: Count = 1,
) -> int:
    """Rehearse faults on small runs: kills, hangs, full disks and lost nodes.

    Args:
        only: Name of a drill to run. May be repeated.
        out: Folder for the runs.
        at_once: Drills that run at a time.
    """
    from vjepa_launch.drill import drills

    cluster = drills.with_two_ranks(load_profile(on, nodes))
    chosen = drills.choose(cluster, only)
    results = []
    for result in drills.rehearse_all(chosen, out, cluster, at_once=at_once):
        results.append(result)
        verdict = "as expected" if result.passed else "not as expected"
        print(f"{len(results)} of {len(chosen)}: {result.drill.name}, {verdict}", file=sys.stderr)
    print(drills.table(results))
    return 0 if all(result.passed for result in results) else 1
