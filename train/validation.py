"""Validation: the loss on fixed samples that are not training data, with their references and without."""

from dataclasses import replace

import torch

from realcustom import RealCustomAdapter

from .config import TrainConfig
from .curriculum import Curriculum
from .data.mixture import Mixture
from .frozen import FrozenModels
from .objective import Encoded, Objective, draw
from .sources import open_source

NUM_SAMPLES = 64
SEED = 1_000_003  # of the samples, their noise and timesteps; the same for every run


class Validation:
    """The samples of `data.validation` at the end of the curriculum: other views at all sizes, without dropout.

    A useful reference lowers the loss: `validation_loss` falls below `validation_loss_without_reference`.
    """

    def __init__(self, config: TrainConfig, frozen: FrozenModels, objective: Objective) -> None:
        assert config.data.validation is not None
        self._frozen, self._objective = frozen, objective
        self._config = replace(config.objective, drop_text=0, drop_vision=0, drop_both=0)
        self._size = config.micro_batch_size
        resolution = config.data.resolution
        curriculum = Curriculum(total_steps=1, first_step=1, r_max=config.curriculum.r_max)
        mixture = Mixture(
            [open_source(config.data.validation, "held_out")],
            buckets=((resolution, resolution),),
            batch_size=NUM_SAMPLES,
            seed=SEED,
            curriculum=curriculum,
            reference_size=frozen.reference_size,
        )
        self._samples = mixture.samples(0, range(NUM_SAMPLES))

    @torch.no_grad()
    def __call__(self, adapter: RealCustomAdapter) -> dict[str, float]:
        """The metrics of an adapter in float32."""
        sums = torch.zeros(2, device=self._frozen.device)
        for start in range(0, NUM_SAMPLES, self._size):
            part = range(start, min(start + self._size, NUM_SAMPLES))
            encoded = self._frozen.encode(self._samples[part.start : part.stop])
            sums += torch.stack([self._loss(adapter, encoded, part, keep) for keep in (True, False)])
        loss, without_reference = (sums / NUM_SAMPLES).tolist()
        return {"validation_loss": loss, "validation_loss_without_reference": without_reference}

    def _loss(self, adapter: RealCustomAdapter, encoded: Encoded, part: range, keep_vision: bool) -> torch.Tensor:
        draws = draw(
            self._config,
            encoded.latents.shape[1:],
            part,
            seed=SEED,
            step=0,
            batch_size=NUM_SAMPLES,
            num_timesteps=self._objective.num_timesteps,
            device=self._frozen.device,
        )
        draws = replace(draws, keep_vision=torch.full_like(draws.keep_vision, keep_vision))
        with self._frozen.autocast():
            keys_values = adapter(encoded.features)
            with self._objective.attending(keys_values, draws.keep_vision):
                return self._objective.losses(encoded, draws).sum()
