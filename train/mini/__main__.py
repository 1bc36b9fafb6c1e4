"""Pretraining of the embedded model: `python -m train.mini STAGE --out FOLDER`.

Stages in order: tokenizer, vae, base, vision, export. Then `python -m train mini` trains the adapter from the exported
folder, and `classifiers` and `evaluate` measure it. `start` writes the checkpoints of vae, base and vision from an
exported model, to continue it. Each stage keeps its checkpoints in `FOLDER/STAGE` and resumes from them.

Imports are inside the functions that need them, so that `--help` is fast and worker processes, which import this file
again, stay light.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ..arguments import at_least, torch_device

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "assets" / "mini"
STAGES = ("sprites", "start", "tokenizer", "vae", "base", "vision", "classifiers", "evaluate", "export")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.mini", description="Pretrain the embedded model, stage by stage. See docs/mini.md."
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, for example runs/stages")
    parser.add_argument("--sprites", type=Path, help="sprites: `assets` folder of the unpacked npm package")
    parser.add_argument(
        "--model",
        type=Path,
        default=EMBEDDED_MODEL,
        help="start, evaluate, vision --keep: model to read; export: model to write (default: the embedded model)",
    )
    parser.add_argument("--run", type=Path, help="export: folder of a run of recipe mini, whose adapter to include")
    parser.add_argument("--threads", type=at_least(1), help="number of CPU threads (default: chosen by PyTorch)")
    parser.add_argument("--device", type=torch_device, help="torch device (default: cuda if available, else cpu)")
    parser.add_argument(
        "--max-samples",
        type=at_least(1),
        help="total number of training samples, up to which the learning rate falls (default: no limit and no decay)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        help="samples per step of base (default: 64, on a GPU 1024) or vision (24, on a GPU 768); with start: of base",
    )
    parser.add_argument(
        "--keep", action="store_true", help="vision: keep the features of --model, so that its adapter remains usable"
    )
    parser.add_argument("--max-seconds", type=at_least(0.0), help="stop after this time; the next call resumes")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="base: compile the UNet (on a CPU 20%% faster after two minutes of compilation)",
    )
    parser.add_argument(
        "--instances",
        type=at_least(2),  # a case of some tasks has two
        default=200,
        help="evaluate: number of instances per task (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one stage; `argv` defaults to the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    check_inputs(parser, args)
    try:
        run_stage(args)
    except (ValueError, OSError) as error:  # a mistake in the arguments or their folders; a full disk
        logging.debug("Traceback:", exc_info=True)
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def check_inputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if the folder that the stage reads, --sprites or --model, is not of the required kind."""
    if args.stage == "sprites":
        from ..data.sprite_world.sprites import CATEGORIES

        if args.sprites is None:
            parser.error("stage sprites needs --sprites, the `assets` folder of the unpacked npm package")
        for name in (f"{code}.webp" for code in CATEGORIES.values()):
            if not (args.sprites / name).is_file():
                parser.error(
                    f"--sprites is {args.sprites}, which contains no {name}; give the `assets` folder of the unpacked "
                    "npm package @lobehub/fluent-emoji-3d."
                )
    if args.stage in ("start", "evaluate") or (args.stage == "vision" and args.keep):
        from .export import MODEL_INDEX, TRAINING

        name = TRAINING if args.stage == "start" else MODEL_INDEX
        if not (args.model / name).is_file():
            parser.error(
                f"--model is {args.model}, which contains no {name}; give a folder that stage export has written, or "
                "leave it out to read the embedded model."
            )


def run_stage(args: argparse.Namespace) -> None:
    """Run a stage.

    Raises:
        ValueError, OSError: the arguments or their folders do not fit the stage, or the disk is full.
    """
    if args.stage == "sprites":
        from ..data.sprite_world.sprites import prepare_sprites

        prepare_sprites(args.sprites)
        return

    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"device": device, "max_samples": args.max_samples, "max_seconds": args.max_seconds}
    if args.stage == "start":
        from .warm_start import warm_start

        warm_start(args.model, args.out, device, args.batch_size)
    elif args.stage == "tokenizer":
        from .tokenizer import train_tokenizer

        train_tokenizer(args.out / "tokenizer")
    elif args.stage == "vae":
        from .vae import train_vae

        train_vae(args.out / "vae", **options)
    elif args.stage == "base":
        from .text_to_image import train_base

        train_base(args.out, compiled=args.compile, batch_size=args.batch_size, **options)
    elif args.stage == "vision":
        from .vision_encoders import train_vision

        keep = args.model if args.keep else None
        train_vision(args.out / "vision", keep=keep, batch_size=args.batch_size, **options)
    elif args.stage == "classifiers":
        from ..evaluate.classifiers import train_classifiers

        train_classifiers(args.out / "classifiers", **options)
    elif args.stage == "evaluate":
        from realcustom.pipeline import RealCustomPipeline

        from ..evaluate.classifiers import load_classifiers
        from ..evaluate.report import evaluate

        pipeline = RealCustomPipeline.from_pretrained(args.model).to(device)
        evaluate(pipeline, load_classifiers(args.out), args.out / "evaluate", args.instances)
    else:
        from .export import export

        export(args.out, args.model, args.run)


if __name__ == "__main__":
    main()
