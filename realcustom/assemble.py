"""Command line: `python -m realcustom.assemble BASE --adapter RealCustom_highres.pth --out models/sdxl`.

Combines a base model, both vision encoders and an adapter into one folder that `from_pretrained` and the server load.
"""

import argparse
import logging
from pathlib import Path

from .config import DINOV2, SIGLIP

logger = logging.getLogger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m realcustom.assemble", description=__doc__)
    parser.add_argument("base", help="hub id, diffusers folder or single .safetensors file")
    parser.add_argument("--adapter", help="RealCustom++ weights: .safetensors, or the authors' .pth")
    parser.add_argument("--siglip", default=SIGLIP, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--dinov2", default=DINOV2, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--preset", choices=("paper", "release"), default="paper", help="default: %(default)s")
    parser.add_argument("--base-config", help="for a single file: folder with the configurations of its family")
    parser.add_argument(
        "--replace-unet", action="store_true", help="let UNet weights in the adapter's file replace those of the base"
    )
    parser.add_argument("--variant", help="variant of the files in the base's folder, such as fp16")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to; it must not exist")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists already; choose a new folder.")
    return args


def main(arguments: list[str] | None = None) -> None:
    options = vars(parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch  # after parsing, so that --help does not wait for it

    from .pipeline import RealCustomPipeline

    out, base, adapter = options.pop("out"), options.pop("base"), options.pop("adapter")
    options["dtype"] = getattr(torch, options["dtype"])
    pipeline = RealCustomPipeline.from_parts(base, adapter, **options)
    pipeline.save_pretrained(out, safe_serialization=True)
    logger.info("Wrote %s. Start a server with: serve run serving:app model=%s", out, out)


if __name__ == "__main__":
    main()
