"""One denoising step, the paper's Figure 3(b): guidance branch, generation branch, and the UNet call that both use.

Legend: R rows of a UNet call, B generations, S subjects, T text tokens, h x w positions of a level.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attention import AttentionLayers, StopForward, level_sizes
from .config import MethodConfig
from .generation import Generation
from .mask import guidance_masks
from .recorder import AttentionRecorder
from .text import TextCondition
from .visual_attention import SparseMask, VisualAttention

_compilations = itertools.count()


class Denoiser:
    """Advances any set of generations by one step of a UNet.

    Args:
        unet: a stock `UNet2DConditionModel`. Its attention processors are replaced by equivalent ones that also
            support references and recording.
        method: where the paper and the authors' release differ.

    Attributes:
        allow_early_exit: whether a call may skip work: keys and values of texts that are cached, and layers of the
            guidance branch after the last one that records. False if layers are loaded onto the device in a fixed
            order.
    """

    def __init__(self, unet, method: MethodConfig) -> None:
        self.unet, self.method = unet, method
        self.attention = AttentionLayers(unet)
        self.allow_early_exit = True
        self._call = self._call_unet
        self._programs = ""  # name of the compiled programs in use; unique to a UNet and a compilation

    def compile(self, mode: str | None = None, **options) -> None:
        """Compile the whole UNet; see `RealCustomPipeline.compile`."""
        if not self.allow_early_exit:
            raise ValueError(
                "memory tier 'low' loads the UNet layer by layer, so it cannot be compiled whole; "
                "compile its blocks, or use memory tier 'high' or 'medium'."
            )
        of_mode = torch._inductor.list_mode_options(mode) if mode else {}  # torch takes a mode or options, not both
        of_backend = {"guard_filter_fn": self._guards_of_calls, **of_mode, **(options.pop("options", None) or {})}
        self._call = torch.compile(self._call_unet, fullgraph=True, options=of_backend, **options)
        self._programs = str(next(_compilations))
        self.attention.compiled_whole = True

    def _guards_of_calls(self, guards) -> list[bool]:
        """Select the guards of a new program that every call evaluates.

        Guards on the inputs of a call are kept: tensors, recordings and attributes of the processors. Thousands of
        guards on the UNet's own modules, up to 4% of a small UNet's call, are dropped; a guard on the name of the
        programs replaces them. With a LoRA loaded, all guards are kept, because its scale and layers may change at any
        time.
        """
        if self._has_lora:
            return [True] * len(guards)
        of_calls = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
        return [kept or ".processor." in guard.name for kept, guard in zip(of_calls, guards, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """The type that the UNet computes in."""
        stored = self.unet.conv_in.weight.dtype
        if stored.itemsize == 1:  # fp8 storage, see `enable_layerwise_casting`
            return self.unet.dtype  # considers the type of computation, but walks all modules
        return stored

    @property
    def _has_lora(self) -> bool:
        return hasattr(self.unet, "peft_config")

    @torch.no_grad()
    def prepare_text(self, text: TextCondition) -> TextCondition:
        """Add the keys and values of every layer to `text`. They do not depend on the timestep."""
        if not self.allow_early_exit or hasattr(self.unet, "_hf_hook"):  # its weights are loaded during the call
            return text
        embeds = text.embeds.to(self.dtype)
        return replace(text, keys_values=self.attention.text_keys_values(embeds[None]))

    @torch.no_grad()
    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every generation by one step, each at its own timestep and with its own settings.

        Args:
            generations: of one image size, none of them done.
        """
        assert generations and len({g.size for g in generations}) == 1, "generations of one size step together"
        assert not any(g.done for g in generations), "a finished generation has no next step"
        if guided := [g for g in generations if g.needs_guidance_branch]:
            self.guidance_branch(guided)
        for generation, noise in zip(generations, self.generation_branch(generations), strict=True):
            generation.advance(noise)

    def guidance_branch(self, generations: Sequence[Generation]) -> None:
        """Run the text-only branch and compute new guidance masks from its attention (Eq. 14, 15, 18)."""
        texts = [g.text for g in generations]
        _, relevance = self.predict(generations, texts, recorder=self.make_recorder(generations), return_output=False)
        assert relevance is not None
        self.set_masks(generations, relevance)

    def make_recorder(self, generations: Sequence[Generation]) -> AttentionRecorder:
        """Create a recorder of the attention to the target words of these generations."""
        num_subjects = max(2, *(len(g.references) for g in generations))  # `torch.compile` specializes on a size of 1
        tokens = torch.stack([_pad_rows(g.target_tokens, num_subjects) for g in generations])  # [B, S, T]
        return AttentionRecorder(self.attention.levels, self.method.mask_maps, tokens)

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
        recorded = [g for g in generations if g.records_next_mask]
        conditional = [*recorded, *(g for g in generations if not g.records_next_mask)]
        guided = [g for g in conditional if g.negative_text is not None]  # those with an unconditional row
        outputs, relevance = self.predict(
            [*conditional, *guided],
            [g.text for g in conditional] + [g.negative_text for g in guided if g.negative_text is not None],
            vision=self._visual_attention(conditional, guided),
            recorder=self.make_recorder(recorded) if recorded else None,
        )
        assert outputs is not None
        if relevance is not None:
            self.set_masks(recorded, relevance)
        noise_text = dict(zip(map(id, conditional), outputs, strict=False))
        noise_uncond = dict(zip(map(id, guided), outputs[len(conditional) :], strict=True))

        def combine(generation: Generation) -> Tensor:
            text = noise_text[id(generation)]
            if generation.negative_text is None:
                return text
            uncond = noise_uncond[id(generation)]
            return uncond + generation.request.guidance_scale * (text - uncond)  # Eq. 17

        return [combine(generation) for generation in generations]

    def _visual_attention(
        self, generations: Sequence[Generation], guided: Sequence[Generation]
    ) -> VisualAttention | None:
        """References and masks of the conditional rows, followed by those of the unconditional rows."""
        rows = [(row, g, g.references) for row, g in enumerate(generations) if g.references]
        unconditional = enumerate(guided, start=len(generations))
        rows += [(row, g, g.negative_references) for row, g in unconditional if g.negative_references]
        if not rows:
            return None
        masks = {}
        for level in set(self.attention.levels.values()):
            height, width = self.sizes(generations[0])[level]
            parts = [g.sparse_masks((height, width), self.method.mask_resize) for _, g, _ in rows]
            masks[level] = SparseMask.stack(parts, [row * height * width for row, _, _ in rows])
        return VisualAttention(keys_values=[kv for _, _, references in rows for kv in references], masks=masks)

    def predict(
        self,
        rows: Sequence[Generation],
        texts: Sequence[TextCondition],
        vision: VisualAttention | None = None,
        recorder: AttentionRecorder | None = None,
        return_output: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run one UNet call with one row per generation and text.

        Args:
            rows: the generation of each row; it gives latents, timestep and size condition.
            texts: the text of each row.
            vision: references and masks; None for text only.
            recorder: records the attention of the first B rows.
            return_output: False ends the call after the last layer that records.
        Returns:
            The output, fp32 [R, channels, height, width], or None; and the relevance of every position to every
            subject, fp32 [B, S, h, w], or None without a recorder.
        """
        dtype = self.dtype
        added = None
        pooled = [t.pooled for t in texts if t.pooled is not None]
        if pooled:
            added = {
                "text_embeds": torch.stack(pooled).to(dtype),
                "time_ids": torch.stack([g.time_ids for g in rows]).to(dtype),
            }
        keys_values = [t.keys_values for t in texts if t.keys_values is not None]
        with self.attention.attention_context(
            text=keys_values if len(keys_values) == len(texts) else (),
            vision=vision,
            recordings=recorder.layers if recorder else None,
            stop_after_recording=not return_output and self.allow_early_exit,
        ):
            return self._call(
                torch.stack([g.model_input() for g in rows]).to(dtype),
                torch.stack([g.timestep for g in rows]),
                torch.stack([t.embeds for t in texts]).to(dtype),
                added,
                recorder,
                self.sizes(rows[0]),
                return_output,
                f"{self._programs} LoRA" if self._has_lora else self._programs,
            )

    def _call_unet(
        self,
        sample: Tensor,
        timestep: Tensor,
        embeds: Tensor,
        added: dict[str, Tensor] | None,
        recorder: AttentionRecorder | None,
        sizes: Sequence[tuple[int, int]],
        return_output: bool,
        programs: str,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The part of a call that only involves tensors. When compiled, it computes only what it returns."""
        torch._check(programs is not None)  # reads the name, so that a guard on it is created
        try:
            output = self.unet(
                sample, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False
            )[0]
        except StopForward:
            output = None
        relevance = recorder.relevance(sizes, self.method.mask_normalization) if recorder else None
        return output.float() if return_output and output is not None else None, relevance

    def sizes(self, generation: Generation) -> list[tuple[int, int]]:
        """(h, w) of each level of the UNet."""
        height, width = generation.latents.shape[-2:]
        return level_sizes(height, width, len(self.unet.config.down_block_types))


def _pad_rows(tokens: Tensor, num_rows: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, num_rows - len(tokens)))
