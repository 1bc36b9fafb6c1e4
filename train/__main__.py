"""Command line of the trainer: `python -m train RECIPE [--set key=value ...] [--resume]`.

`accelerate launch -m train RECIPE ...` runs the same on several GPUs or nodes, `--ray N` on a Ray cluster.
"""

import argparse
import logging
from collections.abc import Sequence

from .overrides import override
from .recipes import RECIPES


def build_parser() -> argparse.ArgumentParser:
    recipes = "\n\n".join(f"{name}: {recipe.__doc__.strip()}" for name, recipe in RECIPES.items() if recipe.__doc__)
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train the adapter of RealCustom++. See docs/training.md.",
        epilog=f"recipes:\n{recipes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=RECIPES, help="configuration to start from; described below")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field, such as steps=1000, data.sources.0.path=/data or model.base=FOLDER; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in the folder `out`")
    parser.add_argument(
        "--ray", metavar="N|MIN:MAX", help="train on a Ray cluster with N workers, or elastically with MIN to MAX"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a recipe; `argv` defaults to the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = override(RECIPES[args.recipe](), args.set)
    except ValueError as error:
        parser.error(str(error))
    try:
        if args.ray is not None:
            try:
                from .ray import parse_workers, run_on_ray
            except ImportError as error:
                parser.exit(1, f"{parser.prog}: error: --ray needs Ray ({error}); pip install 'ray[train]'.\n")
            run_on_ray(config, num_workers=parse_workers(args.ray), resume=args.resume)
        else:
            from .trainer import run

            run(config, resume=args.resume)
    except (ValueError, OSError) as error:  # a mistake in the configuration, the data or the models; a full disk
        logging.debug("Traceback:", exc_info=True)
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:  # before `run` handles signals, while modules are imported
        if args.ray is not None:
            raise
        parser.exit(130, "Stopped before the first step.\n")


if __name__ == "__main__":
    main()
