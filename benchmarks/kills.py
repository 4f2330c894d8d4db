"""kill -9, again and again, at the fixed points of a save and at random moments: does the run end with the same bits?

    python benchmarks/kills.py --kills 200                                      a single rank
    python benchmarks/kills.py --kills 200 --world 2 --workers 2 --background   ranks, loader workers, saves in the back

It is the test of tests/distributed/test_kills.py, for as long as you like, on a run of a few thousand parameters.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent.parent / "tests"


def load(file: Path) -> ModuleType:
    """A file of the tests, which are not a package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--world", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="loader workers of each (default: %(default)s)")
    parser.add_argument("--background", action="store_true", help="save in the background")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    tiny, test = load(TESTS / "conftest.py"), load(TESTS / "distributed" / "test_kills.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        make = tiny.maker_of_runs(tiny.write_tiny_corpus(out / "corpus"))
        run = make(
            steps=5 * args.kills,
            checkpoint={"every_steps": 2, "background": args.background},
            loader={"workers": args.workers},
            parallel={"timeout_s": 20, "accumulate": 2},
        )
        start_s = time.perf_counter()
        at_random = args.kills - len(test.POINTS)
        # It asserts that all losses, norms and last weights are equal.
        test.kill_and_compare(run, out, world=args.world, at_random=at_random, seed=args.seed, limit_s=1200)
        attempts = json.loads((out / "kills" / "run" / "environment.json").read_text())["attempts"]
        print(
            f"{args.kills} kills, {len(attempts) - 1} of them of a run under way; {run.steps} steps on {args.world} "
            f"rank(s), {args.workers} workers, background={args.background}: every loss, gradient norm and last weight "
            f"is that of the run in peace ({time.perf_counter() - start_s:.0f} s)"
        )


if __name__ == "__main__":
    main()
