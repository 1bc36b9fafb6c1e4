"""Toy training runs for tests: every recipe with tiny models and a few images."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import (
    stock_pipeline,
    tiny_pipeline,
    tiny_vision_encoders,
)

from train.config import TrainConfig
from train.overrides import override
from train.recipes import RECIPES


def write_base(folder: Path, family: str) -> list[str]:
    """Write tiny frozen models and return the settings that select them: "mini" is a complete pipeline of one folder;
    "sdxl" and "sd15" are stock folders with separate vision encoders."""
    if family == "mini":
        tiny_pipeline().save_pretrained(folder / "mini")
        return [f"model.base={folder / 'mini'}"]
    stock_pipeline(family).save_pretrained(folder / "base")
    for name, encoder in zip(("siglip", "dinov2"), tiny_vision_encoders(num_layers=27)):
        encoder.save_pretrained(folder / name)
    return [f"model.{name}={folder / name}" for name in ("base", "siglip", "dinov2")]


def write_data(folder: Path) -> list[str]:
    """Write a tar shard of captioned images and two instances with three views each; return the settings."""
    rng = np.random.default_rng(0)

    def jpeg() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (256, 320, 3), np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    (folder / "text_image").mkdir(parents=True)
    with tarfile.open(folder / "text_image" / "00000.tar", "w") as shard:
        for number in range(6):
            for name, content in ((f"{number}.jpg", jpeg()), (f"{number}.txt", b"a dog on the beach")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    for instance in ("a", "b"):
        views = folder / "multiview" / "dog" / instance / "images"
        views.mkdir(parents=True)
        for view in range(3):
            (views / f"{view}.jpg").write_bytes(jpeg())
    return [
        "data.sources="
        + json.dumps(
            [
                {"kind": "text_image", "path": str(folder / "text_image")},
                {"kind": "multiview", "path": str(folder / "multiview")},
            ]
        )
    ]


def toy_config(recipe: str, out: Path, settings: list[str]) -> TrainConfig:
    """A recipe at toy size on the CPU: two samples per step at 64 px, a line of the log per step."""
    return override(
        RECIPES[recipe](),
        [
            f"out={out}",
            "device=cpu",
            "precision=fp32",
            "steps=4",
            "batch_size=2",
            "micro_batch_size=1",
            "optimizer.warmup_steps=2",
            "data.resolution=64",
            "data.aspect_buckets=false",
            "data.workers=0",
            "curriculum.total_steps=8",
            f"curriculum.first_step={3 if recipe == 'sdxl_1024' else 0}",
            "checkpoint.every_steps=2",
            "log.every_steps=1",
            "log.trackers=",
            "preview.every_steps=0",
            "model.adapter=new",
            *settings,
        ],
    )


def losses(out: Path) -> list[float]:
    """The loss of every step in the log of a run."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]  # others are validations
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
