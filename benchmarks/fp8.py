"""Quality gate for a UNet whose weights are stored in float8: masks and latents against bfloat16, on trained weights.

    python benchmarks/fp8.py                         # on a CPU; about seven minutes on one core
    python benchmarks/fp8.py --device cuda

The embedded model generates the same images in float32, in bfloat16 and with
`unet.enable_layerwise_casting(torch.float8_e4m3fn)`. The step from float32 to bfloat16 is accepted practice, so float8
passes if it stays close to bfloat16 on the same scale: an IoU of the guidance masks of at least 0.95, and latents at
most three times as far from float32. A mode that fails must not become an option of the pipeline.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import rounded
from benchmarks.workbench import mask_iou
from realcustom import Generation, RealCustomPipeline, Request
from realcustom.assets import MINI_MODEL
from train.evaluate.cases import Case

MIN_IOU, MAX_DISTANCE_RATIO = 0.95, 3.0


def generate(pipeline: RealCustomPipeline, requests: Sequence[Request]) -> list[Generation]:
    """All steps of each request, one after the other."""
    generations = [pipeline.prepare(request) for request in requests]
    for generation in generations:
        pipeline.run([generation])
    return generations


def latent_distance(ones: Sequence[Generation], others: Sequence[Generation]) -> float:
    """Root mean square difference of the final latents, relative to the root mean square of `ones`."""
    one, other = (torch.stack([g.latents.float() for g in group]) for group in (ones, others))
    return float((one - other).pow(2).mean().sqrt() / one.pow(2).mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the report to this JSON file")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    requests = [Case(index).request() for index in range(args.images)]
    results = {}
    for mode in ("float32", "bfloat16", "float8"):
        dtype = torch.float32 if mode == "float32" else torch.bfloat16
        pipeline = RealCustomPipeline.from_pretrained(MINI_MODEL, dtype=dtype).to(args.device)
        if mode == "float8":
            pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
        results[mode] = generate(pipeline, requests)

    distances = {mode: latent_distance(results["float32"], results[mode]) for mode in ("bfloat16", "float8")}
    report = {
        "images": args.images,
        "mask IoU, bfloat16 with float32": mask_iou(results["float32"], results["bfloat16"]),
        "mask IoU, float8 with bfloat16": mask_iou(results["bfloat16"], results["float8"]),
        "latent distance from float32, bfloat16": distances["bfloat16"],
        "latent distance from float32, float8": distances["float8"],
    }
    report["passed"] = (
        report["mask IoU, float8 with bfloat16"] >= MIN_IOU
        and distances["float8"] <= MAX_DISTANCE_RATIO * distances["bfloat16"]
    )
    text = json.dumps(rounded(report), indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
