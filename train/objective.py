"""The training loss: sample -> keys and values -> unmasked visual attention -> loss on epsilon or v (Eq. 1, 2, 4).

All random numbers of a sample are a function of (seed, step, position in the global batch), so that any number of
processes on any device computes the same noise, timestep and dropout for it.

Legend: B batch, C latent channels, h, w latent size, T text tokens, D channels of the text, N vision tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from realcustom.attention import AttentionLayers
from realcustom.vision import VisionFeatures
from realcustom.visual_attention import KeysValues, VisualAttention

from .config import ObjectiveConfig
from .data.order import derive_key, generator, uniforms
from .noise import normals


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Samples as the frozen models encode them.

    Attributes:
        latents: scaled latents of the images, float32 [B, C, h, w].
        embeds: text conditions, [B, T, D].
        pooled: pooled texts [B, P], or None for models that take none (SD1.5).
        features: vision features of the references.
        time_ids: original size, crop and target size, float32 [B, 6] (SDXL).
        inside: 1 inside the reference's subjects and 0 outside, float32 [B, 1, h, w]. It is 1
            everywhere for a sample whose source marks none; None if the sources of all samples mark none.
    """

    latents: Tensor
    embeds: Tensor
    pooled: Tensor | None
    features: VisionFeatures
    time_ids: Tensor
    inside: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of B samples.

    Attributes:
        noise: standard normal, float32 [B, C, h, w], on the device of the computation.
        timesteps: int64 [B], on the CPU.
        keep_text, keep_vision: whether each sample keeps its condition, bool [B], on the CPU.
    """

    noise: Tensor
    timesteps: Tensor
    keep_text: Tensor
    keep_vision: Tensor


def draw(
    config: ObjectiveConfig,
    latent_shape: Sequence[int],
    positions: range,
    *,
    seed: int,
    step: int,
    batch_size: int,
    num_timesteps: int,
    device: torch.device | str = "cpu",
) -> Draws:
    """The random numbers of the samples at `positions` of the global batch.

    Timesteps are stratified: position p draws from the p-th of `batch_size` equal intervals, in an order that is
    shuffled at each step. This lowers the variance of the loss.

    Args:
        latent_shape: (C, h, w).
        seed, step: of the run.
        batch_size: of the global batch.
        num_timesteps: training timesteps of the noise schedule.
        device: of the noise.
    """
    order = generator(seed, "strata", step).permutation(batch_size)[positions.start : positions.stop]
    numbers = np.arange(positions.start, positions.stop)
    uniform = (order + uniforms(derive_key(seed, "timestep", step), numbers)) / batch_size
    timesteps = (uniform**config.timestep_exponent * num_timesteps).astype(np.int64).clip(max=num_timesteps - 1)
    # One uniform number per sample selects the case: text dropped, reference dropped, both dropped, or none.
    dropout = uniforms(derive_key(seed, "dropout", step), numbers)
    text_end = config.drop_text
    vision_end = text_end + config.drop_vision
    both_end = vision_end + config.drop_both
    drop_both = (vision_end <= dropout) & (dropout < both_end)
    return Draws(
        noise=normals(derive_key(seed, "noise", step), positions, latent_shape, device),
        timesteps=torch.from_numpy(timesteps),
        keep_text=torch.from_numpy((dropout >= text_end) & ~drop_both),
        keep_vision=torch.from_numpy((dropout < text_end) | (dropout >= both_end)),
    )


def noisy_and_target(
    scheduler: DDIMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents z_t = sqrt(α_t) z_0 + sqrt(1 - α_t) ε (Eq. 2), and what the UNet predicts: ε (Eq. 1), or v.

    Raises:
        ValueError: the model predicts something else.
    """
    alphas = scheduler.alphas_cumprod.to(clean.device)[timesteps][:, None, None, None]
    signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    noisy = signal * clean + sigma * noise
    prediction = scheduler.config["prediction_type"]
    if prediction == "epsilon":
        return noisy, noise
    if prediction == "v_prediction":
        return noisy, signal * noise - sigma * clean
    raise ValueError(f"the base's prediction_type is {prediction!r}; it must be 'epsilon' or 'v_prediction'.")


def min_snr_weight(scheduler: DDIMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of the loss per sample, float32 [B] (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting").

    The weight for epsilon is min(SNR, γ) / SNR. The loss on v equals the sum of the losses on the noise and on the
    clean image; its weight is (min(SNR, γ) + 1) / (SNR + 1). Unlike the weight of Hang et al.,
    min(SNR, γ) / (SNR + 1), it is not zero for pure noise (SNR 0), where sampling starts.
    """
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].double()
    snr = alphas / (1 - alphas).clamp_min(1e-8)
    if scheduler.config["prediction_type"] == "epsilon":
        return (snr.clamp_max(gamma) / snr.clamp_min(1e-8)).float()
    return ((snr.clamp_max(gamma) + 1) / (snr + 1)).float()


def position_weight(inside: Tensor, outside_weight: float) -> Tensor:
    """Weight of each position in the loss: 1 inside the subjects, `outside_weight` outside.

    Scenes cover most of an image, but subjects need more training. The weights do not change the optimum.
    """
    return outside_weight + (1 - outside_weight) * inside


class Objective:
    """The loss of a frozen UNet with visual attention.

    Args:
        unet: the frozen UNet, which may be compiled.
        scheduler: its noise schedule and prediction type.
        empty_text: text condition of an empty caption: embeds [T, D] and pooled text [P] or None.
        config: see `ObjectiveConfig`.
        device: of the computation.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        empty_text: tuple[Tensor, Tensor | None],
        config: ObjectiveConfig,
        device: torch.device,
    ) -> None:
        self.unet, self.scheduler, self.config, self.device = unet, scheduler, config, device
        self._attention = AttentionLayers(unet)
        self._empty_embeds, self._empty_pooled = empty_text
        self._uses_pooled_text = unet.config["addition_embed_type"] == "text_time"

    @property
    def num_timesteps(self) -> int:
        """Training timesteps of the noise schedule."""
        return len(self.scheduler.alphas_cumprod)

    @contextmanager
    def attending(self, keys_values: KeysValues, keep_vision: Tensor) -> Iterator[None]:
        """Add unmasked visual attention to every cross-attention layer (Eq. 4) inside the context.

        The backward pass must run inside the context too, because gradient checkpointing repeats the forward pass.

        Args:
            keys_values: of the references, each [B, N, channels] in every layer.
            keep_vision: bool [B]; the attention of the other samples is zero, as without a reference.
        """
        keep = keep_vision.to(self.device)[:, None, None]
        kept = {name: (key, value * keep.to(value.dtype)) for name, (key, value) in keys_values.items()}
        with self._attention.attention_context(vision=VisualAttention(keys_values=(kept,), masks=None)):
            yield

    def losses(self, encoded: Encoded, draws: Draws) -> Tensor:
        """Weighted loss of each sample, float32 [B]."""
        noise, timesteps = draws.noise.to(self.device), draws.timesteps.to(self.device)
        noisy, target = noisy_and_target(self.scheduler, encoded.latents, noise, timesteps)
        keep = draws.keep_text.to(self.device)
        embeds = torch.where(keep[:, None, None], encoded.embeds, self._empty_embeds)
        added = None
        if self._uses_pooled_text:
            assert encoded.pooled is not None and self._empty_pooled is not None
            pooled = torch.where(keep[:, None], encoded.pooled, self._empty_pooled)
            added = {"text_embeds": pooled, "time_ids": encoded.time_ids.to(pooled.dtype)}
        dtype = self.unet.dtype
        predicted = self.unet(
            noisy.to(dtype, memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=embeds,
            added_cond_kwargs=added,
        ).sample.float()
        squared = (predicted - target).pow(2)
        if encoded.inside is not None and self.config.outside_weight < 1:
            squared = squared * position_weight(encoded.inside, self.config.outside_weight)
        losses = squared.mean((1, 2, 3))
        if self.config.min_snr_gamma is None:
            return losses
        return losses * min_snr_weight(self.scheduler, timesteps, self.config.min_snr_gamma)


def inside_of_latents(inside: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps of subjects [B, H, W] at image resolution -> the fraction inside at each latent position, [B, 1, h, w]."""
    return F.adaptive_avg_pool2d(inside[:, None].float(), size)
