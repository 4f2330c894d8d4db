"""Verbs for those who train: look at settings, train here or on a cluster, and see how runs are doing."""

import argparse
import os
import sys
import time
from pathlib import Path

from vjepa.cli.cluster import launch_array, on_cluster, profile, say
from vjepa.cli.verb import Verbs, amount, config, count, number, out


def add_verbs(verbs: Verbs) -> None:
    """Declare them."""
    _declare_demo(verbs)
    _declare_show(verbs)
    _declare_estimate(verbs)
    _declare_train(verbs)
    _declare_launch(verbs)
    group = verbs.group("runs", "the runs on this machine or cluster")
    _declare_runs(group)
    _declare_doctor(verbs)
    group = verbs.group("bench", "how fast things are on this machine")
    _declare_bench(group)
    _declare_drill(verbs)


def _declare_demo(verbs: Verbs) -> None:
    verb = verbs.add(
        "demo",
        demo,
        "the whole path on this machine, in minutes",
        settings=True,
        example="demo --videos my/videos --out runs/mine steps=400",
    )
    verb.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="PATH", help="folder to work in (default: %(default)s)"
    )
    verb.add_argument(
        "--videos", type=Path, metavar="DIR", help="folder of your own videos, in place of generated physics scenes"
    )


def _declare_show(verbs: Verbs) -> None:
    verb = verbs.add(
        "show", show, "resolved settings, and where each came from", settings=True, example="show demo optim.lr=1e-3"
    )
    config(verb)
    verb.add_argument("--masks", type=Path, metavar="PNG", help="draw what the masks of a step show and hide")
    verb.add_argument("--stream", type=count, metavar="SLOTS", help="which sample, time and crop fill the first slots")
    verb.add_argument(
        "--step", type=number, default=0, metavar="N", help="step of the masks or the stream (default: %(default)s)"
    )


def _declare_estimate(verbs: Verbs) -> None:
    verb = verbs.add(
        "estimate",
        estimate,
        "memory, FLOPs, messages and hours, before you queue",
        settings=True,
        example="estimate vitl16_256px_16f --nodes 16 parallel.recompute=full",
    )
    config(verb)
    verb.add_argument("--nodes", type=count, default=1, metavar="N", help="machines (default: %(default)s)")
    verb.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="of each (default: %(default)s)")
    verb.add_argument(
        "--gpu", default="h100", metavar="NAME", help="a100, h100, h200, b200 or l40s (default: %(default)s)"
    )
    verb.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that you reach (default: %(default)s)",
    )


def _declare_train(verbs: Verbs) -> None:
    verb = verbs.add(
        "train",
        train,
        "train in this process, or in any number of them under torchrun",
        settings=True,
        example="train demo --out runs/demo steps=100",
    )
    config(verb)
    out(verb, "run folder (default: runs/NAME); one that exists is continued", required=False)


def _declare_launch(verbs: Verbs) -> None:
    verb = verbs.add(
        "launch",
        launch,
        "train on a cluster through submitit, or here in the background",
        settings=True,
        example="launch vitl16_256px_16f --on h100 --nodes 16 --dry-run",
    )
    verb.add_argument("config", metavar="CONFIG|SWEEP", help="a run file, the name of one, or a file of a sweep")
    on_cluster(verb)
    out(verb, "run folder (default: runs/NAME); one that exists is continued", required=False)
    verb.add_argument("--dry-run", action="store_true", help="print what would be submitted, and touch nothing")
    verb.add_argument("--refreeze", action="store_true", help="take the present code, though the run has its own")
    verb.add_argument("--replace-settings", action="store_true", help="take these settings, though the run has its own")


def _declare_runs(verbs: Verbs) -> None:
    verb = verbs.add("list", runs_list, "a line for each", example="runs list --root runs")
    verb.add_argument(
        "--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of run folders (default: %(default)s)"
    )
    verb = verbs.add("show", runs_show, "all about one", example="runs show runs/demo")
    verb.add_argument("run", type=Path, metavar="RUN", help="its folder")
    verb = verbs.add("logs", runs_logs, "what a rank wrote", example="runs logs runs/demo --rank 7 -f")
    verb.add_argument("run", type=Path, metavar="RUN", help="its folder")
    verb.add_argument("--rank", type=number, default=0, metavar="N", help="of which (default: %(default)s)")
    verb.add_argument("-n", "--lines", type=count, default=100, metavar="N", help="from the end (default: %(default)s)")
    verb.add_argument("-f", "--follow", action="store_true", help="and what it goes on to write")
    verb = verbs.add("cancel", runs_cancel, "end one for good", example="runs cancel runs/demo --after-checkpoint")
    verb.add_argument("run", type=Path, metavar="RUN", help="its folder")
    verb.add_argument("--after-checkpoint", action="store_true", help="save first, however long it takes")
    verb = verbs.add(
        "requeue",
        runs_requeue,
        "save and come back; one that is over is launched again",
        example="runs requeue runs/demo",
    )
    verb.add_argument("run", type=Path, metavar="RUN", help="its folder")


def _declare_doctor(verbs: Verbs) -> None:
    verb = verbs.add(
        "doctor",
        doctor,
        "would a run work on this machine, or on all nodes of a cluster",
        settings=True,
        example="doctor demo --on slurm",
    )
    verb.add_argument("config", metavar="CONFIG", nargs="?", help="a run, to read and decode its shards")
    verb.add_argument(
        "--folder", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: %(default)s)"
    )
    verb.add_argument("--on", metavar="CLUSTER", help="every node of a profile, compared: a file, or a name")
    verb.add_argument("--nodes", type=count, metavar="N", help="machines, in place of the profile's number")
    verb.add_argument("--visit", type=Path, help=argparse.SUPPRESS)  # one rank of a job that --on started


def _declare_bench(verbs: Verbs) -> None:
    verb = verbs.add(
        "loader",
        bench_loader,
        "clips per second, and what each stage costs",
        settings=True,
        example="bench loader demo --demand 93",
    )
    config(verb)
    verb.add_argument(
        "--demand", type=amount, metavar="CLIPS_PER_S", help="what a GPU would take: how long would it wait"
    )
    verb.add_argument("--seconds", type=amount, default=20.0, metavar="S", help="to measure for (default: %(default)s)")


def _declare_drill(verbs: Verbs) -> None:
    verb = verbs.add(
        "drill",
        drill,
        "rehearse what happens to a run when things go wrong",
        example="drill --on local --only kill-first",
    )
    on_cluster(verb)
    verb.add_argument("--only", action="append", default=[], metavar="NAME", help="this drill; may be repeated")
    verb.add_argument(
        "--out", type=Path, default=Path("runs/drill"), metavar="PATH", help="folder (default: %(default)s)"
    )
    verb.add_argument("--at-once", type=count, default=1, metavar="N", help="drills at a time (default: %(default)s)")


def demo(args: argparse.Namespace) -> int:
    from vjepa.demo import demo

    return demo(args.out, videos=args.videos, overrides=args.overrides)


def show(args: argparse.Namespace) -> None:
    from vjepa.config import load
    from vjepa_data.config_files import flatten, one_line

    loaded = load(args.config, args.overrides)
    run = loaded.settings
    if args.masks:
        from vjepa.viz.mask_plot import draw_mask_sheet

        draw_mask_sheet(run, args.masks, step=args.step)
        print(args.masks)
    if args.stream:
        from vjepa_data.reader.show import stream

        print(stream(run.data, seed=run.seed, batch_size=run.batch_size, step=args.step, slots=args.stream))
    if not args.masks and not args.stream:
        rows = [(name, one_line(value), loaded.origins[name]) for name, value in flatten(run)]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for name, value, origin in rows:
            print(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}")


def estimate(args: argparse.Namespace) -> None:
    from vjepa.config import load
    from vjepa.estimate import ACCELERATORS, estimate
    from vjepa_data.settings import BadInput

    if args.gpu not in ACCELERATORS:
        raise BadInput(f"--gpu {args.gpu}: we know the peak of {', '.join(ACCELERATORS)} only")
    run = load(args.config, args.overrides).settings
    gpus = args.nodes * args.gpus_per_node
    print(estimate(run, gpus=gpus, accelerator=ACCELERATORS[args.gpu], mfu=args.mfu).text())


def train(args: argparse.Namespace) -> int:
    from vjepa.config import load
    from vjepa.engine.trainer import train
    from vjepa.monitoring.health import Collapsed, Unhealthy

    run = load(args.config, args.overrides).settings
    try:
        return train(run, args.out or Path("runs") / run.name)
    except (Unhealthy, Collapsed) as error:
        print(f"vjepa train: {error}", file=sys.stderr)
        return 1


def launch(args: argparse.Namespace) -> None:
    from vjepa.config import load
    from vjepa_data.config_files import dump_settings, load_settings
    from vjepa_launch import array, submit, sweep
    from vjepa_launch.request import Request, train_command

    on = profile(args.on, args.nodes)
    if _is_sweep(Path(args.config)):
        plan = load_settings(sweep.Sweep, Path(args.config), args.overrides).settings
        folder = (args.out or Path("runs") / plan.name).resolve()
        elements = [
            array.Element(
                variant.name,
                tuple(train_command(folder / variant.name)),
                dump_settings(load(plan.config, variant.overrides).settings),
            )
            for variant in sweep.expand(plan)
        ]
        asked = array.Array(
            folder, on, elements, name=plan.name, at_once=plan.at_once, refreeze=args.refreeze,
            replace_settings=args.replace_settings,
        )  # fmt: skip
        launch_array(asked, dry_run=args.dry_run)
        return
    run = load(args.config, args.overrides).settings
    folder = (args.out or Path("runs") / run.name).resolve()
    request = Request(
        folder, on, train_command(folder), config=dump_settings(run), name=run.name, refreeze=args.refreeze,
        replace_settings=args.replace_settings,
    )  # fmt: skip
    if args.dry_run:
        print(submit.describe(request), end="")
    else:
        say(submit.launch(request))


def _is_sweep(path: Path) -> bool:
    """A file that names the run file it starts from, and is none itself."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # whatever is wrong is said when it is read as a run file
    return isinstance(values, dict) and "config" in values


def runs_list(args: argparse.Namespace) -> None:
    from rich.console import Console

    from vjepa_launch import status

    statuses, warning = status.read_all(status.find_runs(args.root))
    console = Console()  # a reason may wrap where a terminal has room for it; nothing is cut off for want of room
    console.width = max(console.width, 120) if console.is_terminal else 1000
    console.print(status.table(statuses) if statuses else f"no runs under {args.root}")
    if warning:
        print(warning)


def runs_show(args: argparse.Namespace) -> None:
    from vjepa_launch import status

    print(status.describe(args.run))


def runs_logs(args: argparse.Namespace) -> None:
    from vjepa_launch import status

    for text in status.read_log(args.run, rank=args.rank, lines=args.lines, follow=args.follow):
        print(text, end="", flush=True)


def runs_cancel(args: argparse.Namespace) -> None:
    from vjepa_launch import status

    print(status.cancel(args.run, after_checkpoint=args.after_checkpoint))


def runs_requeue(args: argparse.Namespace) -> None:
    from vjepa_launch import status, submit

    said = status.requeue(args.run)
    if said:
        print(said)
    else:
        say(submit.launch_again(args.run))


def doctor(args: argparse.Namespace) -> int:
    from vjepa.config import load
    from vjepa_data.config_files import dump_settings
    from vjepa_launch.doctor import cluster
    from vjepa_launch.doctor.machine import examine, table

    run = load(args.config, args.overrides).settings if args.config else None
    if args.on:
        folder = (args.folder / "doctor" / time.strftime("%Y%m%d-%H%M%S")).resolve()
        about = [str(folder / "config.yaml")] if run else []
        command = ["python", "-m", "vjepa", "doctor", *about, "--visit", str(folder)]
        config = dump_settings(run) if run else "name: doctor\n"
        found = cluster.examine_cluster(folder, profile(args.on, args.nodes), command, config=config)
        findings = cluster.compare(found)
    else:
        from vjepa import doctor

        if args.visit is None:
            findings = examine(args.folder, doctor.looks(run))
        else:
            findings = examine(args.visit, doctor.looks(run)) if os.environ["LOCAL_RANK"] == "0" else []
            findings += doctor.exchange_between_ranks()
            if os.environ["LOCAL_RANK"] == "0":
                cluster.report(args.visit, findings)
            return 0
    print(table(findings))
    return 1 if any(finding.level == "bad" for finding in findings) else 0


def bench_loader(args: argparse.Namespace) -> None:
    from vjepa.config import load
    from vjepa_data.reader import bench

    run = load(args.config, args.overrides).settings
    of = {"seed": run.seed, "batch_size": run.batch_size}
    stages = bench.measure_stages(run.data, run.loader, **of)
    rate = bench.measure_rate(run.data, run.loader, **of, seconds=args.seconds, demand=args.demand)
    print(bench.describe(stages, rate, args.demand))


def drill(args: argparse.Namespace) -> int:
    from vjepa_launch.drill import drills

    cluster = drills.with_two_ranks(profile(args.on, args.nodes))
    chosen = drills.choose(cluster, args.only)
    results = []
    for result in drills.rehearse_all(chosen, args.out, cluster, at_once=args.at_once):
        results.append(result)
        what = "as expected" if result.passed else "not as expected"
        print(f"{len(results)} of {len(chosen)}: {result.drill.name}, {what}", file=sys.stderr)
    print(drills.table(results))
    return 0 if all(result.passed for result in results) else 1
