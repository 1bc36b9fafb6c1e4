"""The recipe of the embedded model: `python -m train.mini STAGE --out FOLDER`.

Stages in order: sprites (or start, from a shipped model), tokenizer, vae, base, vision, adapter, judges, evaluate,
export. Each keeps checkpoints under `FOLDER/STAGE` and takes up where it left off. Worker processes import this file
again, so heavy imports wait.
"""

import argparse
import logging
from pathlib import Path

STAGES = ("sprites", "start", "tokenizer", "vae", "base", "vision", "adapter", "judges", "evaluate", "export")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.mini", description="Train the embedded model, stage by stage."
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, outside the source tree")
    parser.add_argument("--sprites", type=Path, help="stage sprites: `assets` folder of the unpacked npm package")
    parser.add_argument(
        "--model", type=Path, default=Path("assets/mini"), help="stages start, export and evaluate: the model"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--device", help="default: a GPU if there is one, else the CPU")
    parser.add_argument(
        "--max-samples", type=int, help="train to this many samples in all; the learning rate ends there"
    )
    parser.add_argument("--max-seconds", type=float, help="stop after so long; the next call resumes")
    parser.add_argument(
        "--compile", action="store_true", help="stages base and adapter: a fifth faster after two minutes"
    )
    parser.add_argument("--individuals", type=int, default=200, help="stage evaluate: how many in each task")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    if args.stage == "sprites":
        from .data.sprites import prepare_sprites

        if args.sprites is None:
            parser.error("stage sprites needs --sprites, the `assets` folder of the npm package")
        prepare_sprites(args.sprites)
        return

    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"device": device, "max_samples": args.max_samples, "max_seconds": args.max_seconds}
    if args.stage == "start":
        from .warm_start import warm_start

        warm_start(args.model, args.out)
    elif args.stage == "tokenizer":
        from .tokenizer import train_tokenizer

        train_tokenizer(args.out / "tokenizer")
    elif args.stage == "vae":
        from .stages.vae import train_vae

        train_vae(args.out / "vae", **options)
    elif args.stage == "base":
        from .stages.base import train_base

        train_base(args.out, compiled=args.compile, **options)
    elif args.stage == "vision":
        from .stages.vision import train_vision

        train_vision(args.out / "vision", **options)
    elif args.stage == "adapter":
        from .stages.adapter import train_adapter

        train_adapter(args.out, compiled=args.compile, **options)
    elif args.stage == "judges":
        from .evaluate.judges import train_judges

        train_judges(args.out / "judges", **options)
    elif args.stage == "evaluate":
        from .evaluate.report import evaluate

        evaluate(args.model, args.out, num_individuals=args.individuals, device=device)
    else:
        from .export import export

        export(args.out, args.model)


if __name__ == "__main__":
    main()
