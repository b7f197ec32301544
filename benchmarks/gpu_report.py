"""Measure on a GPU all that the documentation asks of one, in at most ten minutes.

    python benchmarks/gpu_report.py                      # on the first GPU, to gpu-report/
    python benchmarks/gpu_report.py --long               # more cases and repeats, within an hour
    python benchmarks/gpu_report.py --only operator amp  # some sections
    python benchmarks/gpu_report.py --dry                # on the CPU with tiny sizes, to try it

It installs nothing, needs no data and no network. Each section runs in a process of its own, the
most important first; what it found is written when it ends. report.md has the goals at its top.
"""

import os

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from gpu_parts import report
from gpu_parts.processes import run_section
from gpu_parts.sections import SECTIONS, Section
from gpu_parts.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
LEAST = 5  # seconds below which a section is not begun
LONGER = 10  # times that a section may take in the long form
EARLIER = ("report.json", "report.md", "*.png")  # what a report leaves behind


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="MINUTES",
                        help="for all together; 10 by default, 60 with --long")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("gpu-report"))
    parser.add_argument("--long", action="store_true", help="more cases and repeats")
    parser.add_argument("--dry", action="store_true", help="on the CPU, to try it; no figures")
    args = parser.parse_args(words)
    args.only = ["environment", *args.only]
    args.budget = (60 if args.long else 10) if args.budget is None else args.budget
    if not args.budget > 0:
        parser.error(f"--budget must be above 0, got {args.budget}. Give minutes.")
    return args


def prepare(args: argparse.Namespace, scratch: Path) -> Settings:
    """Make the folder and set what PyTorch and Triton read when they are loaded."""
    keep_earlier(args.output)
    os.environ["DETECTRON2_DATASETS"] = str(scratch / "datasets")
    sys.path.insert(1, str(ROOT))  # which processes that are started take over
    if args.dry:
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        import gpu_parts.preload  # noqa: F401 -- once for all sections, which are forked
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    return Settings(args.dry, args.long, args.output.resolve(), scratch)


def keep_earlier(folder: Path) -> None:
    """Make the folder, and move a report that is in it aside."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for pattern in EARLIER for file in folder.glob(pattern)]
    if files:
        number = 1 + sum(1 for _ in folder.glob("earlier-*"))
        aside = folder / f"earlier-{number}"
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)


def run_all(
    sections: list[Section], only: list[str], settings: Settings, budget: float, form: str
) -> dict:
    """Run the sections in turn and write the report after each.

    Args:
        sections: all of the report.
        only: names of those to run.
        settings: for each of them.
        budget: seconds for all of them.
        form: of the report, in words.
    """
    found = {s.name: {"status": "not run: left out"} for s in sections if s.name not in only}
    end = time.monotonic() + budget

    def written() -> dict:
        content = report.assemble(sections, found, form, settings.dry)
        report.write(content, settings.output)
        return content

    for section in (s for s in sections if s.name not in found):
        left = end - time.monotonic()
        if left < LEAST:
            found[section.name] = {"status": "not run: the time of the report was used up"}
            continue
        limit = min(section.limit * (LONGER if settings.long else 1), left)
        print(f"{section.title} ... ", end="", flush=True)
        try:
            found[section.name] = run_section(section, settings, limit)
        except KeyboardInterrupt:
            found[section.name] = {"status": "not run: stopped by the user"}
            written()
            raise
        print(f"{found[section.name]['status']}, {found[section.name]['seconds']:.0f} s")
        written()
        if section.name == "environment" and not settings.dry:
            check_device(found[section.name], settings.output)
    return written()


def check_device(found: dict, folder: Path) -> None:
    """End the report where its first section saw no GPU."""
    if not found.get("data", {}).get("device"):
        status = found["status"]
        raise SystemExit(
            "error: the report must have a CUDA device that PyTorch sees, got "
            f"{'none' if status == 'done' else status}. Look at {folder / 'report.md'}, or try the "
            "command with --dry."
        )


def main() -> None:
    """Parse, prepare, run, say where the report is."""
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    form = "On the CPU, dry: no figures of speed." if args.dry else "On a GPU."
    form += f" Command: `python benchmarks/gpu_report.py{''.join(f' {w}' for w in sys.argv[1:])}`."
    with tempfile.TemporaryDirectory(prefix="gpu_report_", ignore_cleanup_errors=True) as scratch:
        try:
            settings = prepare(args, Path(scratch))
            content = run_all(SECTIONS, args.only, settings, args.budget * 60, form)
        except KeyboardInterrupt:
            raise SystemExit(
                f"Stopped. What was found is in {args.output / 'report.md'}."
            ) from None
        except OSError as error:
            raise SystemExit(f"error: the report must be written, got: {error}.") from None
    print(report.summary(content))
    print(f"Wrote {args.output / 'report.md'} and {args.output / 'report.json'}.")


if __name__ == "__main__":
    main()
