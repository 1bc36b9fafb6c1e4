"""One denoising step, the paper's Figure 3(b): guidance branch and generation branch.

Legend: R rows of a UNet call, B generations, S subjects, h x w positions of a level.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attention import AttentionLayers, level_sizes
from .config import Execution, MethodConfig
from .execution import Executor, create_executor, offloads_layers
from .generation import Generation, sort_guidance_masks
from .keys_values import KeysValues
from .mask import guidance_masks
from .text import TextCondition
from .unet_call import Pair, UNetCall, exact_positions, stack_columns


class Denoiser:
    """Advances any set of generations by one step of a UNet.

    Args:
        unet: a stock `UNet2DConditionModel`. Its attention processors are replaced by equivalent ones that also
            support references and recording.
        method: where the paper and the authors' release differ.
        execution: how UNet calls run: "graphs" replays CUDA graphs, "eager" launches each kernel, "auto" uses graphs on
            CUDA devices.
    """

    def __init__(self, unet, method: MethodConfig, execution: Execution = "auto") -> None:
        self.unet, self.method = unet, method
        self._execution: Execution = execution
        self.attention = AttentionLayers(unet)
        self._executor: Executor | None = None
        self._device = torch.device("meta")

    @property
    def executor(self) -> Executor:
        """Runs the UNet calls; it is created when the UNet is on its device."""
        device = next(self.unet.parameters()).device
        if self._executor is None or device != self._device:
            self._executor = create_executor(self._execution, self.attention, self.method)
            self._device = device
        return self._executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self._executor, self._device = executor, next(self.unet.parameters()).device

    def set_execution(self, execution: Execution) -> None:
        """Change how UNet calls run."""
        self.retire()
        self._execution, self._executor = execution, None

    def retire(self) -> None:
        """Discard the executor's buffers and graphs, if it has any."""
        if self._executor is not None:
            self._executor.retire()

    @property
    def dtype(self) -> torch.dtype:
        """The type that the UNet computes in."""
        stored = self.unet.conv_in.weight.dtype
        if stored.itemsize == 1:  # fp8 storage, see `enable_layerwise_casting`
            return self.unet.dtype  # considers the type of computation, but walks all modules
        return stored

    @torch.no_grad()
    def prepare_text(self, text: TextCondition) -> TextCondition:
        """Add the keys and values of every layer to `text`. They do not depend on the timestep."""
        if offloads_layers(self.unet):  # the weights are only on the device during a call
            return text
        return replace(text, keys_values=self.attention.text_keys_values(text.embeds.to(self.dtype)[None]))

    @torch.no_grad()
    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every generation by one step, each at its own timestep and with its own settings.

        Args:
            generations: of one image size, none of them done.
        """
        assert generations and len({g.size for g in generations}) == 1, "generations of one size step together"
        assert not any(g.done for g in generations), "a finished generation has no next step"
        self.executor.start_step()
        if guided := [g for g in generations if g.needs_guidance_branch]:
            self.guidance_branch(guided)
        for generation, noise in zip(generations, self.generation_branch(generations), strict=True):
            generation.advance(noise)

    def guidance_branch(self, generations: Sequence[Generation]) -> None:
        """Run the text-only branch and compute new guidance masks from its attention (Eq. 14, 15, 18)."""
        texts = [g.text for g in generations]
        _, relevance = self.predict(generations, texts, recorded=generations, return_output=False)
        assert relevance is not None
        self.set_masks(generations, relevance)

    def set_masks(self, generations: Sequence[Generation], relevance: Tensor) -> None:
        """Set the guidance masks from the relevance [B, S, h, w] of every position to every subject."""
        for generation, r in zip(generations, relevance, strict=True):
            scopes = [s.scope_ratio for s in generation.request.subjects]
            generation.set_masks(guidance_masks(r[: len(scopes)], scopes, self.method))

    def generation_branch(self, generations: Sequence[Generation]) -> list[Tensor]:
        """Run the branch with text and masked references, with classifier-free guidance (Eq. 16, 17, 19).

        Returns:
            the guided model output [channels, height, width] of each generation.
        """
        # The recorded rows must come first. Those of the guidance branch follow, so that both branches have the same
        # texts in the same rows and the executor does not copy their keys and values again.
        conditional = sorted(generations, key=lambda g: (not g.records_next_mask, not g.needs_guidance_branch))
        with_uncond = [g for g in conditional if g.negative_text is not None]  # those with an unconditional row
        recorded = [g for g in conditional if g.records_next_mask]
        outputs, relevance = self.predict(
            [*conditional, *with_uncond],
            [g.text for g in conditional] + [g.negative_text for g in with_uncond if g.negative_text is not None],
            references=[g.references for g in conditional] + [g.negative_references for g in with_uncond],
            recorded=recorded,
        )
        assert outputs is not None
        if relevance is not None:
            self.set_masks(recorded, relevance)
        noise_text = dict(zip(map(id, conditional), outputs, strict=False))
        noise_uncond = dict(zip(map(id, with_uncond), outputs[len(conditional) :], strict=True))

        def combine(generation: Generation) -> Tensor:
            text = noise_text[id(generation)]
            if generation.negative_text is None:
                return text
            uncond = noise_uncond[id(generation)]
            return uncond + generation.request.guidance_scale * (text - uncond)  # Eq. 17

        return [combine(generation) for generation in generations]

    def predict(
        self,
        rows: Sequence[Generation],
        texts: Sequence[TextCondition],
        *,
        references: Sequence[Sequence[KeysValues]] = (),
        recorded: Sequence[Generation] = (),
        return_output: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run one UNet call with one row per generation and text.

        Args:
            rows: the generation of each row; it gives latents, timestep, size condition and masks.
            texts: the text of each row.
            references: the references of each row, inside the row's guidance masks; empty for text only.
            recorded: the generations of the first B rows, if their attention is recorded.
            return_output: False ends the call after the last layer that records.
        Returns:
            The output, fp32 [R, channels, height, width], or None; and the relevance of every position to every
            subject, fp32 [B, S, h, w], or None if nothing is recorded.
        """
        sizes, dtype = self.sizes(rows[0]), self.dtype
        pairs = self._pairs(rows, references, sizes)
        call = UNetCall(
            sample=torch.stack([g.model_input() for g in rows]).to(dtype),
            timestep=torch.stack([g.timestep.float() for g in rows]),
            texts=texts,
            time_ids=torch.stack([g.time_ids for g in rows]).to(dtype),
            pairs=pairs,
            positions=exact_positions(pairs, sizes),
            columns=stack_columns([g.target_tokens for g in recorded]) if recorded else None,
            sizes=sizes,
            return_output=return_output,
        )
        return self.executor.run(call)

    def _pairs(
        self,
        rows: Sequence[Generation],
        references: Sequence[Sequence[KeysValues]],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Pair]:
        """The references of all rows, each with the masks of its subject."""
        levels = {level: sizes[level] for level in sorted(set(self.attention.levels.values()))}
        masked = [g for g, of_row in zip(rows, references, strict=bool(references)) if of_row]
        sort_guidance_masks(list(dict.fromkeys(masked)), list(levels.values()), self.method.mask_resize, self.dtype)
        return [
            Pair(
                row=row,
                keys_values=keys_values,
                masks={level: generation.sorted_masks[size][subject] for level, size in levels.items()},
                largest={level: generation.largest_masks[size] for level, size in levels.items()},
            )
            for row, (generation, of_row) in enumerate(zip(rows, references, strict=bool(references)))
            for subject, keys_values in enumerate(of_row)
        ]

    def sizes(self, generation: Generation) -> list[tuple[int, int]]:
        """(h, w) of each level of the UNet."""
        height, width = generation.latents.shape[-2:]
        return level_sizes(height, width, len(self.unet.config.down_block_types))
