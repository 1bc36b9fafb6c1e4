"""The report: does the picture show the right individuals, what does it show at all, and is it in the right scene?

For held-out individuals, each in a scene, several ways of making the same picture from the same seed: with guidance
masks, with masks of ones (every reference everywhere), and from words alone; for one subject also with masks by both
approximations. The judges pick among ten references of the same category, and name the category and the scene. Chance
is 10%, 6.25% and 12.5%.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from realcustom.pipeline import RealCustomPipeline

from ..data.render import pixels_of
from ..data.sprite_world import KINDS
from ..pictures import save_grid, to_signed
from .cases import TASKS, Case
from .judges import load_judges

log = logging.getLogger(__name__)

# Way -> settings of its requests.
WAYS: dict[str, dict] = {
    "masked": {},
    "masked, from the generation branch": {"mask_source": "generation_branch"},
    "masked, at every 3rd step": {"mask_interval": 3},
    "mask of ones": {},
    "words alone": {"subjects": ()},
}
MAIN_WAYS = ("masked", "mask of ones", "words alone")  # of the tasks with two subjects


@torch.no_grad()
def make_pictures(pipeline: RealCustomPipeline, cases: list[Case], way: str, batch_size: int = 8) -> list[Image.Image]:
    pictures = []
    for start in range(0, len(cases), batch_size):
        some = cases[start : start + batch_size]
        ones = torch.ones(len(cases[0].given), 8, 8) if way == "mask of ones" else None
        generations = [pipeline.prepare(case.request(**WAYS[way]), masks=ones) for case in some]
        while not generations[0].done:
            pipeline.step(generations)
        pictures += pipeline.decode(generations)
        pipeline.clear_caches()
    log.info("%s, %s: %d pictures", cases[0].task, way, len(pictures))
    return pictures


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    return to_signed(np.stack([pixels_of(picture) for picture in pictures]))


def judge(judges, cases: list[Case], pictures: list[Image.Image]) -> dict[str, float]:
    """Fractions: of subjects the right individual picked and the category named, of pictures the scene named."""
    views = _pixels([view for case, picture in zip(cases, pictures, strict=True) for view in case.views(picture)])
    kin = torch.stack([judges.embed(_pixels(references)) for case in cases for references in case.references])
    categories = torch.tensor([KINDS.index(category) for case in cases for category in case.categories])
    right = {
        "individual": (judges.embed(views)[:, None] @ kin.transpose(1, 2))[:, 0].argmax(-1) == 0,
        "category": judges.category(views).argmax(-1) == categories,
        "scene": judges.scene(_pixels(pictures)).argmax(-1) == torch.tensor([case.scene for case in cases]),
    }
    return {name: float(hits.float().mean()) for name, hits in right.items()}


def evaluate(model: Path, out: Path, num_individuals: int = 200, device: str = "cpu") -> dict[str, dict]:
    """Write report.json, report.md and unpicked grids, one per task, to `out/evaluate`; returns the numbers.

    Args:
        num_individuals: asked for in each task; pictures of two subjects need half as many pictures.
    """
    pipeline = RealCustomPipeline.from_pretrained(model).to(device)
    judges = load_judges(out)
    folder = out / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for task in TASKS:
        ways = tuple(WAYS) if task == "One2One" else MAIN_WAYS
        number = 1 if task == "One2One" else 2
        cases = [Case(i, task) for i in range(num_individuals // number)]
        results[task] = {"real pictures (upper bound)": judge(judges, cases, [case.truth for case in cases])}
        rows = [[case.given[subject] for case in cases] for subject in range(2 if task == "Many2Many" else 1)]
        for way in ways:
            rows.append(make_pictures(pipeline, cases, way))
            results[task][way] = judge(judges, cases, rows[-1])
        columns = min(16, len(cases))
        save_grid(torch.cat([_pixels(row[:columns]) for row in rows]), folder / f"{task}.png", columns=columns)
    (folder / "report.json").write_text(json.dumps({"individuals": num_individuals, **results}, indent=2) + "\n")
    table = markdown(results)
    (folder / "report.md").write_text(table)
    log.info("%d held-out individuals in each task\n%s", num_individuals, table)
    return results


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| | | right individual of 10 | right category of 16 | right scene of 8 |", "|---|---|---|---|---|"]
    for task, ways in results.items():
        for way, right in ways.items():
            numbers = " | ".join(f"{right[name]:.1%}" for name in ("individual", "category", "scene"))
            lines.append(f"| {task} | {way} | {numbers} |")
    return "\n".join(lines) + "\n"
