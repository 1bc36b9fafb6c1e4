"""Trains a toy run and records what each process trains on, for test_train_distributed.py: `record` in this process,
or `accelerate launch record_driver.py SETTINGS` in several.

Writes `samples-RANK.jsonl` with one line per sample: step, position in the global batch, caption and a hash of the
pixels, and a hash of its noise with the timestep and the dropout.
"""

import hashlib
import json
import sys
from pathlib import Path

from toy_training import toy_config

from train import trainer
from train.frozen import FrozenModels


def record(out: Path, assignments: list[str], resume: bool = False) -> None:
    """Train in this process and record the samples."""
    config = toy_config("mini", out, assignments)
    draw, encode = trainer.draw, FrozenModels.encode
    encoded = []

    def recording_encode(self, batch):
        encoded[:] = zip(batch.captions, batch.images, batch.references, strict=True)
        return encode(self, batch)

    def recording_draw(objective, latent_shape, positions, *, step, **options):
        draws = draw(objective, latent_shape, positions, step=step, **options)
        rank = trainer.Accelerator(cpu=True).process_index
        with open(config.out / f"samples-{rank}.jsonl", "a") as file:
            for row, (position, (caption, image, reference)) in enumerate(zip(positions, encoded, strict=True)):
                noise = hashlib.sha256(draws.noise[row].numpy().tobytes()).hexdigest()
                pixels = hashlib.sha256(image.numpy().tobytes() + reference.numpy().tobytes()).hexdigest()
                numbers = [int(draws.timesteps[row]), bool(draws.keep_text[row]), bool(draws.keep_vision[row])]
                file.write(json.dumps([step, position, caption, pixels, noise, *numbers]) + "\n")
        return draws

    trainer.draw, FrozenModels.encode = recording_draw, recording_encode
    try:
        trainer.run(config, resume=resume)
    finally:
        trainer.draw, FrozenModels.encode = draw, encode


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    record(Path(arguments["out"]), arguments["assignments"])
