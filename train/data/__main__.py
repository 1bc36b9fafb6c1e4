"""Command line of the training data: `python -m train.data check PATH` and `python -m train.data precompute RECIPE`.

See docs/training_data.md. Imports are inside the functions that need them: `check` does not load torch.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ..arguments import at_least, torch_device
from ..recipes import RECIPES
from .decode import Limits
from .kinds import KINDS, Kind


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
    check.add_argument("--min-side", type=at_least(1), default=Limits.min_side, help="px (default: %(default)s)")
    check.add_argument("--max-pixels", type=at_least(1), default=Limits.max_pixels, help="(default: %(default)s)")
    check.add_argument("--resolution", type=int, default=512, help="of the aspect buckets (default: %(default)s)")
    check.add_argument(
        "--examples", type=at_least(0), default=3, help="names to show per reason (default: %(default)s)"
    )
    check.add_argument(
        "--evaluation", type=Path, action="append", default=[], metavar="FOLDER",
        help="folder of evaluation images that must not be in the training data; may be repeated",
    )  # fmt: skip
    check.add_argument("--workers", type=at_least(0), help="number of processes (default: one per core)")

    features = commands.add_parser(
        "precompute",
        help="store the features of the frozen models that a run will need",
        description="Store the features of the frozen models that the samples of a run will need. An interrupted call "
        "is continued by the next one. Train with `--set data.features=FOLDER`.",
    )
    features.add_argument("recipe", choices=RECIPES, help="as for `python -m train`")
    features.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for `python -m train`")
    features.add_argument("--out", type=Path, required=True, help="folder of the features")
    features.add_argument("--steps", type=at_least(1), help="number of steps (default: all steps of the run)")
    features.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to store (default: all; vision is the largest)"
    )
    features.add_argument("--device", type=torch_device, help="torch device (default: cuda if available, else cpu)")
    features.add_argument("--rank", type=at_least(0), default=0, help="of this process (default: %(default)s)")
    features.add_argument(
        "--world-size",
        type=at_least(1),
        default=1,
        help="number of processes that share the work (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` defaults to the command line. Returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            logging.basicConfig(level=logging.WARNING, format="%(message)s")
            return run_check(args)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        return run_precompute(args)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 128 + signal.SIGINT  # as in a shell


def run_check(args: argparse.Namespace) -> int:
    from .check import check, default_workers, describe, open_folder
    from .index import NoUsableRecord
    from .transforms import aspect_buckets

    try:
        aspect_buckets(args.resolution)  # before the images are decoded
        source = open_folder(args.path, Limits(min_side=args.min_side, max_pixels=args.max_pixels))
        workers = default_workers() if args.workers is None else args.workers
        report = check(source, args.evaluation, workers)
    except NoUsableRecord as error:
        _print(*describe(error.findings, args.examples))
        _print(str(error), file=sys.stderr)
        return 1
    except ValueError as error:
        _print(str(error), file=sys.stderr)
        return 1
    _print(*report.lines(args.examples, args.resolution))
    if not report.contents.usable:
        _print(f"{args.path} has no usable record; the reasons are above.", file=sys.stderr)
    return 0 if report.contents.usable else 1


def _print(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, in which bytes of file names that are not UTF-8 are escaped."""
    print("\n".join(lines).encode(errors="backslashreplace").decode(), file=file)


def run_precompute(args: argparse.Namespace) -> int:
    import torch

    from ..frozen import FrozenModels, load_pipeline
    from ..overrides import override
    from ..precision import frozen_dtype
    from ..sources import open_mixture
    from .features import FeatureStore, encoder_revisions
    from .precompute import Encode, create_folder, precompute

    try:
        config = override(RECIPES[args.recipe](), args.set)
        if not args.rank < args.world_size <= config.batch_size:
            raise ValueError(
                f"--rank is {args.rank} and --world-size {args.world_size}; the rank must be less than the world size, "
                f"which must be at most the batch size, {config.batch_size}."
            )
        create_folder(args.out)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        pipeline = load_pipeline(config.model, frozen_dtype(config.precision, device.type))
        store = FeatureStore(args.out, encoder_revisions(pipeline))
        frozen = FrozenModels(pipeline, device)
        encoders: dict[Kind, Encode] = {
            "latents": frozen.encode_images,
            "text": lambda samples: frozen.encode_texts([sample.caption for sample in samples]),
            "vision": frozen.encode_references,
        }
        with torch.inference_mode():
            summary = precompute(
                open_mixture(config, frozen.reference_size),
                store,
                {kind: encoders[kind] for kind in args.kinds},
                num_steps=config.steps if args.steps is None else args.steps,
                rank=args.rank,
                world_size=args.world_size,
                workers=config.data.workers,
            )
    except (ValueError, OSError) as error:  # a mistake in the arguments or their folders; a full disk
        print(error, file=sys.stderr)
        return 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
