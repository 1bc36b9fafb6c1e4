"""The sampler of the authors' release as a diffusers scheduler: single-step DPM-Solver++ of alternating order.

diffusers' own single-step solver uses the orders 1, 2, 1, 2, ..., 1. The release uses 1, 1, 2, 1, 2, ... and ends at
training step 0 instead of the clean image, so the two are not interchangeable. Update rules: DPM-Solver++ (Lu et
al. 2022), algorithm 2S with the midpoint rule.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class AlternatingDPMSolverOutput(BaseOutput):
    """Output of a step.

    Attributes:
        prev_sample: the sample at the next timestep.
        pred_original_sample: the current estimate of the clean sample.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class AlternatingDPMSolverScheduler(SchedulerMixin, ConfigMixin):
    """DPM-Solver++ in pairs of a first-order and a second-order step, one model call each.

    The noise schedule is Stable Diffusion's ("scaled_linear"); timesteps are spaced from the end ("trailing").

    Args:
        num_train_timesteps, beta_start, beta_end: the model's noise schedule.
        prediction_type: what the model predicts, "epsilon" or "v_prediction".
    """

    order = 1  # one model call per step

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction_type: str = "epsilon",
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type is {prediction_type!r}; it must be 'epsilon' or 'v_prediction'.")
        self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.init_noise_sigma = 1.0
        self.set_timesteps(25)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Start a new run of this many steps.

        Raises:
            ValueError: the number is not in [1, num_train_timesteps].
        """
        total = self.config["num_train_timesteps"]
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be in [1, {total}].")
        steps = torch.arange(total, 0, -total / num_inference_steps, dtype=torch.float64)[:num_inference_steps] - 1
        self.num_inference_steps = num_inference_steps
        self.timesteps = steps.round().long().to(device)
        at = [*self.timesteps.tolist(), 0]
        alpha, sigma = self.alphas_cumprod[at].sqrt(), (1 - self.alphas_cumprod[at]).sqrt()
        self._alpha, self._sigma, self._log_snr = alpha, sigma, alpha.log() - sigma.log()
        self._step_index: int | None = None
        self._pair_start: tuple[int, Tensor, Tensor] | None = None  # step, sample and estimate of an order-1 step

    @property
    def step_index(self) -> int | None:
        """Number of completed steps; None before the first."""
        return self._step_index

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to clean samples [B, ...] at timesteps [B]."""
        kept = self.alphas_cumprod.to(original_samples.device)[timesteps.to(original_samples.device)]
        kept = kept.view(-1, *[1] * (original_samples.ndim - 1)).to(original_samples.dtype)
        return kept.sqrt() * original_samples + (1 - kept).sqrt() * noise

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> AlternatingDPMSolverOutput | tuple[Tensor, Tensor]:
        """Advance the sample from `timestep` to the next one. Steps must be in order; the first may be any timestep.

        Args:
            model_output, sample: of the same shape [B, ...].
            timestep: one of `timesteps`.
        """
        if self._step_index is None:
            self._step_index = self.timesteps.tolist().index(int(timestep))
        now = self._step_index
        clean = self._clean(model_output, sample, now)
        if self._order(now) == 1:
            self._pair_start = (now, sample, clean)
            result = self._advance(now, now + 1, sample, clean)
        else:
            assert self._pair_start is not None
            start, start_sample, start_clean = self._pair_start
            ratio = (self._log_snr[now] - self._log_snr[start]) / (self._log_snr[now + 1] - self._log_snr[start])
            result = self._advance(start, now + 1, start_sample, start_clean + (clean - start_clean) / (2 * ratio))
        self._step_index = now + 1
        return AlternatingDPMSolverOutput(result, clean) if return_dict else (result, clean)

    def _order(self, index: int) -> int:
        """1, 1, 2, 1, 2, ...; a run that starts in the middle begins with a first-order step."""
        return 2 if index and index % 2 == 0 and self._pair_start is not None else 1

    def _clean(self, model_output: Tensor, sample: Tensor, index: int) -> Tensor:
        alpha, sigma = self._alpha[index], self._sigma[index]  # scalars on the CPU combine with any device
        if self.config["prediction_type"] == "epsilon":
            return (sample - sigma * model_output) / alpha
        return alpha * sample - sigma * model_output

    def _advance(self, start: int, end: int, sample: Tensor, clean: Tensor) -> Tensor:
        """The exact solution between two steps for a constant estimate of the clean sample."""
        shrink = torch.expm1(self._log_snr[start] - self._log_snr[end])
        weights = self._sigma[end] / self._sigma[start], -self._alpha[end] * shrink
        return weights[0] * sample + weights[1] * clean

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]
