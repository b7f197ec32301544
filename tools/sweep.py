#!/usr/bin/env python
"""Run a sweep over settings and seeds, and print its table; see --help."""

import argparse
import os
import sys

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Run every setting of a sweep with every seed, several runs at once, and write "
        "a table of mean and standard deviation, paired differences, and pictures. A finished run "
        "is never run again; one that was interrupted goes on from its last checkpoint.",
        epilog="Examples: python tools/sweep.py --sweep-file configs/sweeps/quickstart.yaml; on "
        "8 GPUs: python tools/sweep.py --sweep-file configs/sweeps/pfpn.yaml --num-gpus 8; as jobs "
        "of 8 GPUs on a cluster: the same with --executor slurm --slurm partition=gpu. "
        "Exit codes: 0 all runs finished, 1 a run failed, 75 stopped by a signal: the same command "
        "goes on.",
    )
    parser.add_argument("--sweep-file", required=True, metavar="FILE", help="see configs/sweeps")
    parser.add_argument("--output", metavar="DIR", help="(default: output/sweeps/<name of FILE>)")
    parser.add_argument("--seeds", type=_seeds, default=(), help="as 1,2,3, in place of the file's")
    many = {"action": "append", "default": []}
    text = "run this setting alone; may be repeated. The table shows all"
    parser.add_argument("--only", **many, metavar="AXIS=LABEL", help=text)
    parser.add_argument("--jobs", type=int, default=0, help="at once (default: all GPUs or cores)")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs, or CPU processes, of a run")
    text = "start all runs, also after the first three failed for the same reason"
    parser.add_argument("--keep-going", action="store_true", help=text)
    text = "this machine (default), a job of SLURM for each run, or these jobs as processes here"
    executors = ("local", "slurm", "submitit-local")
    parser.add_argument("--executor", choices=executors, default="local", help=text)
    text = (
        "any option of sbatch; may be repeated: --slurm partition=gpu --slurm time=12:00:00 "
        "(default: 24 hours, and a job that is longer comes back in the queue)"
    )
    parser.add_argument("--slurm", **many, metavar="OPTION=VALUE", help=text)
    parser.add_argument("--wait", action="store_true", help="for the jobs of SLURM to end")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    parser.add_argument("--report", action="store_true", help="only the table of what is finished")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of every run")
    return parser.parse_args()


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers as 1,2,3, got {text!r}") from None


def main() -> int:
    """Run, then report; 1 if a run failed."""
    args = parse_args()
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from pathlib import Path

    from gn_practical.training.engine.run import one_clear_error

    try:
        from gn_practical.training.sweep import describe, read_plan, report, run_all
    except ModuleNotFoundError as error:
        what = f"a sweep must find its packages, got no {error.name}."
        sys.exit(f"error: {what} pip install 'gn_practical[experiments]'")

    output = args.output or f"output/sweeps/{Path(args.sweep_file).stem}"
    with one_clear_error():
        plan = read_plan(args.sweep_file, output, args.opts, args.seeds)
        chosen = plan.only(args.only)
        if args.dry_run:
            print(describe(chosen, args.num_gpus))
            return 0
        if args.report:
            failed = []
        elif args.executor == "local":
            failed = run_all(chosen, output, args.jobs, args.num_gpus, args.keep_going)
        else:
            from gn_practical.training.sweep.cluster import submit_all

            cluster = args.executor.removeprefix("submitit-")
            failed = submit_all(chosen, output, cluster, args.num_gpus, args.slurm, args.wait)
        print(report(plan, output))
    for run in failed:
        print(f"failed: {run.name}: see {run.folder}/console.log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
