"""The report: does the picture show the right individual, what does it show at all, and is it in the right scene?

For held-out individuals, each in a scene, several ways of making the same picture from the same seed: with the guidance
mask (exactly, and by both approximations), with a mask of ones, and from words alone. The judges pick among ten
references of the same category, and name the category and the scene. Chance is 10%, 6.25% and 12.5%.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from realcustom.pipeline import RealCustomPipeline
from realcustom.request import Request, Subject

from ..data.render import pixels_of
from ..data.scenes import SCENES
from ..data.sprite_world import compose, make_reference, random_instance, scene_ground
from ..data.sprites import TRAINED
from ..pictures import save_grid, to_signed
from .judges import load_judges

log = logging.getLogger(__name__)

CANDIDATES = 10
# Way -> settings of its requests.
WAYS: dict[str, dict] = {
    "masked": {},
    "masked, from the generation branch": {"mask_source": "generation_branch"},
    "masked, at every 3rd step": {"mask_interval": 3},
    "mask of ones": {},
    "words alone": {"subjects": ()},
}


class Case:
    """One held-out individual, a scene to put it into, and nine others of its kind."""

    def __init__(self, index: int) -> None:
        rng = np.random.default_rng((6, index))
        self.index = index
        self.category = list(TRAINED)[index % len(TRAINED)]
        self.scene = int(rng.integers(len(SCENES)))
        individuals = [random_instance(rng, self.category, "held_out") for _ in range(CANDIDATES)]
        self.references = [make_reference(rng, (individual,), on_scene=0.0) for individual in individuals]
        self.given = make_reference(rng, individuals[:1], on_scene=0.0)  # another view than the judge compares with
        self.truth = scene_ground(rng, SCENES[self.scene])  # what a perfect model could have made
        compose(rng, individuals[:1], self.truth)

    @property
    def prompt(self) -> str:
        article = "an" if self.category[0] in "aeiou" else "a"
        return f"{article} {self.category} {SCENES[self.scene]}"

    def request(self, way: str) -> Request:
        settings = {"subjects": (Subject(image=self.given, target_phrase=self.category),), **WAYS[way]}
        return Request(prompt=self.prompt, seed=self.index, **settings)


@torch.no_grad()
def make_pictures(pipeline: RealCustomPipeline, cases: list[Case], way: str, batch_size: int = 8) -> list[Image.Image]:
    pictures = []
    for start in range(0, len(cases), batch_size):
        requests = [case.request(way) for case in cases[start : start + batch_size]]
        ones = torch.ones(1, 8, 8) if way == "mask of ones" else None
        generations = [pipeline.prepare(request, masks=ones) for request in requests]
        while not generations[0].done:
            pipeline.step(generations)
        pictures += pipeline.decode(generations)
        pipeline.clear_caches()
        log.info("%s: %d of %d", way, len(pictures), len(cases))
    return pictures


def _pixels(pictures: list[Image.Image]) -> Tensor:
    return to_signed(np.stack([pixels_of(picture) for picture in pictures]))


def judge(judges, cases: list[Case], pictures: list[Image.Image]) -> dict[str, float]:
    """Fractions of pictures with the right individual picked, and with the category and the scene named."""
    shown = _pixels(pictures)
    picked = judges.embed(shown)[:, None] @ torch.stack([judges.embed(_pixels(c.references)) for c in cases]).transpose(
        1, 2
    )
    categories = torch.tensor([list(TRAINED).index(case.category) for case in cases])
    right = {
        "individual": picked[:, 0].argmax(-1) == 0,
        "category": judges.category(shown).argmax(-1) == categories,
        "scene": judges.scene(shown).argmax(-1) == torch.tensor([case.scene for case in cases]),
    }
    return {name: float(hits.float().mean()) for name, hits in right.items()}


def evaluate(model: Path, out: Path, num_pictures: int = 200, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Write report.json, report.md and an unpicked grid to `out/evaluate`; returns the numbers."""
    pipeline = RealCustomPipeline.from_pretrained(model).to(device)
    judges = load_judges(out)
    cases = [Case(i) for i in range(num_pictures)]
    results = {"real pictures (upper bound)": judge(judges, cases, [case.truth for case in cases])}
    shown: list[list[Image.Image]] = [[case.given for case in cases]]
    for way in WAYS:
        pictures = make_pictures(pipeline, cases, way)
        results[way] = judge(judges, cases, pictures)
        shown.append(pictures)
    folder = out / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    grid = torch.cat([_pixels(row[:16]) for row in shown])
    save_grid(grid, folder / "grid.png", columns=min(16, num_pictures))
    (folder / "report.json").write_text(json.dumps({"pictures": num_pictures, **results}, indent=2) + "\n")
    table = markdown(results)
    (folder / "report.md").write_text(table)
    log.info("%d pictures of held-out individuals\n%s", num_pictures, table)
    return results


def markdown(results: dict[str, dict[str, float]]) -> str:
    lines = ["| | right individual of 10 | right category of 16 | right scene of 8 |", "|---|---|---|---|"]
    lines += [
        f"| {way} | {r['individual']:.1%} | {r['category']:.1%} | {r['scene']:.1%} |" for way, r in results.items()
    ]
    return "\n".join(lines) + "\n"
