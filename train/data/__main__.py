"""Command line of the training data: `python -m train.data check PATH`. See docs/training_data.md."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .decode import Limits


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.data", description="Tools for training data.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="report what a source contains and what is broken",
        description="Report what a source contains and what is broken, by reason. Every image is decoded. The exit "
        "status is 1 if no record can be used.",
    )
    check.add_argument("path", type=Path, help="folder of tar shards, one shard, or folder CATEGORY/INSTANCE/images")
    check.add_argument("--min-side", type=int, default=Limits.min_side, help="px (default: %(default)s)")
    check.add_argument("--max-pixels", type=int, default=Limits.max_pixels, help="(default: %(default)s)")
    check.add_argument("--resolution", type=int, default=512, help="of the aspect buckets (default: %(default)s)")
    check.add_argument("--examples", type=int, default=3, help="names to show per reason (default: %(default)s)")
    check.add_argument(
        "--evaluation", type=Path, action="append", default=[], metavar="FOLDER",
        help="folder of evaluation images that must not be in the training data; may be repeated",
    )  # fmt: skip
    check.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` defaults to the command line. Returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_check(args)


def run_check(args: argparse.Namespace) -> int:
    from .check import check, default_workers, describe, open_folder
    from .index import NoUsableRecord

    try:
        source = open_folder(args.path, Limits(min_side=args.min_side, max_pixels=args.max_pixels))
        workers = default_workers() if args.workers is None else args.workers
        report = check(source, args.evaluation, workers)
    except NoUsableRecord as error:
        print(*describe(error.findings, args.examples), sep="\n")
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(*report.lines(args.examples, args.resolution), sep="\n")
    if not report.contents.usable:
        print(f"{args.path} has no usable record; the reasons are above.", file=sys.stderr)
    return 0 if report.contents.usable else 1


if __name__ == "__main__":
    sys.exit(main())
