"""Evaluation report: fractions of images with the correct instances, categories and scene.

Each case requests held-out instances in a scene. It is generated from the same seed under several conditions: with
guidance masks, with masks of ones (every reference at all positions), and with text only; for one subject also with
guidance masks from both approximations, and for One2Many also with the reference cropped to each subject. The
classifiers select the instance among ten references of the same category, and predict the category and the scene. The
chance levels are 10%, 6.25% and 12.5%.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from realcustom.pipeline import RealCustomPipeline

from ..data.sprite_world.world import TRAINED_CATEGORIES
from ..images import save_grid, to_signed
from ..mini.render import pixels_of
from .cases import TASKS, Case

log = logging.getLogger(__name__)

MASK_OF_ONES = "mask of ones"
CONDITIONS: dict[str, dict[str, Any]] = {  # condition -> settings of its requests
    "masked": {},
    "masked, from the generation branch": {"mask_source": "generation_branch"},
    "masked, every 3rd step": {"mask_interval": 3},
    "masked, cropped references": {"cropped": True},
    MASK_OF_ONES: {},
    "text only": {"subjects": ()},
}
CONDITIONS_OF_TASK = {
    "One2One": ("masked", "masked, from the generation branch", "masked, every 3rd step", MASK_OF_ONES, "text only"),
    "One2Many": ("masked", "masked, cropped references", MASK_OF_ONES, "text only"),
    "Many2Many": ("masked", MASK_OF_ONES, "text only"),
}
UPPER_BOUND = "real images (upper bound)"

Scores = dict[str, float]  # "instance", "category", "scene" -> fraction that is correct
Results = dict[str, dict[str, Scores]]  # task -> condition -> scores


class ImageClassifiers(Protocol):
    """The part of `Classifiers` that the evaluation uses; images are [B, 3, 128, 128] in [-1, 1]."""

    @property
    def scene(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def category(self) -> Callable[[Tensor], Tensor]: ...

    def embed(self, pixels: Tensor) -> Tensor: ...


@torch.no_grad()
def generate_images(
    pipeline: RealCustomPipeline, cases: Sequence[Case], condition: str, batch_size: int = 8
) -> list[Image.Image]:
    """One image per case; all cases must have the same number of subjects."""
    images = []
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        masks = torch.ones(len(batch[0].given), 8, 8) if condition == MASK_OF_ONES else None
        generations = [pipeline.prepare(case.request(**CONDITIONS[condition]), masks=masks) for case in batch]
        pipeline.run(generations)
        images += pipeline.decode(generations)
        pipeline.clear_caches()
    log.info("%s, %s: %d images.", cases[0].task, condition, len(images))
    return images


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return to_signed(np.stack([pixels_of(image) for image in images]))


@torch.no_grad()
def score(classifiers: ImageClassifiers, cases: Sequence[Case], images: Sequence[Image.Image]) -> Scores:
    """Fraction of subjects with the correct instance and category, and fraction of images with the correct scene."""
    views = _pixels([view for case, image in zip(cases, images, strict=True) for view in case.views(image)])
    candidates = torch.stack([classifiers.embed(_pixels(refs)) for case in cases for refs in case.references])
    similarity = (classifiers.embed(views)[:, None] @ candidates.transpose(1, 2))[:, 0]  # [views, candidates]
    categories = torch.tensor([TRAINED_CATEGORIES.index(category) for case in cases for category in case.categories])
    scenes = torch.tensor([case.scene for case in cases])
    right = {
        "instance": similarity.argmax(-1) == 0,
        "category": classifiers.category(views).argmax(-1) == categories,
        "scene": classifiers.scene(_pixels(images)).argmax(-1) == scenes,
    }
    return {name: float(hits.float().mean()) for name, hits in right.items()}


def evaluate(
    pipeline: RealCustomPipeline, classifiers: ImageClassifiers, folder: Path, num_instances: int = 200
) -> Results:
    """Evaluate all tasks and conditions; write report.json, report.md and one image grid per task to `folder`.

    The grids show the first 16 cases. Rows: the given references, then one row per condition.

    Args:
        num_instances: instances per task. A task with two subjects has half as many cases.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    for task in TASKS:
        num_subjects = 1 if task == "One2One" else 2
        cases = [Case(i, task) for i in range(num_instances // num_subjects)]
        results[task] = {UPPER_BOUND: score(classifiers, cases, [case.truth for case in cases])}
        rows = [[case.given[subject] for case in cases] for subject in range(2 if task == "Many2Many" else 1)]
        for condition in CONDITIONS_OF_TASK[task]:
            images = generate_images(pipeline, cases, condition)
            results[task][condition] = score(classifiers, cases, images)
            rows.append(images)
        columns = min(16, len(cases))
        save_grid(torch.cat([_pixels(row[:columns]) for row in rows]), folder / f"{task}.png", columns=columns)
    (folder / "report.json").write_text(json.dumps({"instances": num_instances, **results}, indent=2) + "\n")
    table = markdown(results)
    (folder / "report.md").write_text(table)
    log.info("%d held-out instances per task.\n%s", num_instances, table)
    return results


def markdown(results: Results) -> str:
    """The results as a Markdown table."""
    lines = ["| task | condition | correct instance of 10 | correct category of 16 | correct scene of 8 |"]
    lines.append("|---|---|---|---|---|")
    for task, conditions in results.items():
        for condition, scores in conditions.items():
            cells = " | ".join(f"{scores[name]:.1%}" for name in ("instance", "category", "scene"))
            lines.append(f"| {task} | {condition} | {cells} |")
    return "\n".join(lines) + "\n"
