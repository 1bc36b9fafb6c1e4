"""One step of denoising, the paper's Figure 3(b): guidance branch, generation branch, and the UNet call beneath both.

Legend: R rows of a UNet call, B generations, S subjects, T text tokens, h x w positions of a level.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attention import AttentionLayers, StopForward, VisualAttention, level_sizes
from .config import MethodConfig
from .generation import Generation
from .mask import SparseMask, guidance_masks
from .recorder import AttentionRecorder
from .text import TextCondition

_compilations = itertools.count()


class Denoiser:
    """Args:
    unet: a stock `UNet2DConditionModel`; it gets attention processors that equal the stock ones for plain use.
    method: what the paper and the release do differently.
    """

    def __init__(self, unet, method: MethodConfig) -> None:
        self.unet, self.method = unet, method
        self.attention = AttentionLayers(unet)
        # Whether calls may leave out what is known or not needed: the keys and values of texts, and in the guidance
        # branch all behind the last layer that it records.
        self.allow_early_exit = True
        self._call = self._call_unet
        self._programs = ""  # the name of those that may serve; no two UNets, and no two compilations of one, share any

    def compile(self, mode: str | None = None, **options) -> None:
        """Make one program of each kind of UNet call; see `RealCustomPipeline.compile`."""
        if not self.allow_early_exit:
            raise ValueError(
                "the UNet is brought over layer by layer (memory 'low') and cannot be compiled whole; "
                "compile its blocks, or use memory 'high' or 'medium'."
            )
        of_mode = torch._inductor.list_mode_options(mode) if mode else {}  # torch takes a mode or options, not both
        of_backend = {"guard_filter_fn": self._guards_of_calls, **of_mode, **(options.pop("options", None) or {})}
        self._call = torch.compile(self._call_unet, fullgraph=True, options=of_backend, **options)
        self._programs = str(next(_compilations))
        self.attention.compiled_whole = True

    def _guards_of_calls(self, guards) -> list[bool]:
        """Which of a new program's guards every call checks, to see whether the program serves it.

        Those on what the call brings stay: tensors, recordings, and what the processors are connected to. Thousands on
        the UNet's own modules, which cost up to 4% of a small UNet's call, go; the programs' name stands for them. They
        stay under a LoRA, whose scale and layers may change at any time.
        """
        if self._has_lora:
            return [True] * len(guards)
        of_calls = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
        return [kept or ".processor." in guard.name for kept, guard in zip(of_calls, guards, strict=True)]

    @property
    def _has_lora(self) -> bool:
        return hasattr(self.unet, "peft_config")

    @torch.no_grad()
    def prepare_text(self, text: TextCondition) -> TextCondition:
        """`text` as the UNet takes it, with its keys and values: they do not depend on the step."""
        if not self.allow_early_exit:
            return text
        embeds = text.embeds.to(self.unet.conv_in.weight.dtype)  # `unet.dtype` walks all modules
        return replace(text, keys_values=self.attention.text_keys_values(embeds[None]))

    @torch.no_grad()
    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every generation by one step, each at its own timestep and with its own settings.

        Args:
            generations: images of one size, none of them done.
        """
        assert generations and len({g.size for g in generations}) == 1, "images of one size advance together"
        assert not any(g.done for g in generations), "a finished image has no next step"
        if guided := [g for g in generations if g.needs_guidance_branch]:
            self.guidance_branch(guided)
        for generation, noise in zip(generations, self.generation_branch(generations), strict=True):
            generation.advance(noise)

    def guidance_branch(self, generations: Sequence[Generation]) -> None:
        """Text alone; what the target words attend to becomes each generation's new guidance masks (Eq. 14, 15, 18)."""
        texts = [g.text for g in generations]
        _, relevance = self.predict(generations, texts, recorder=self._recorder(generations), output_wanted=False)
        self.set_masks(generations, relevance)

    def _recorder(self, generations: Sequence[Generation]) -> AttentionRecorder:
        num_subjects = max(2, *(len(g.references) for g in generations))  # one would be a program of its own
        tokens = torch.stack([_pad_rows(g.target_tokens, num_subjects) for g in generations])  # [B, S, T]
        return AttentionRecorder(self.attention.levels, self.method.mask_maps, tokens)

    def set_masks(self, generations: Sequence[Generation], relevance: Tensor) -> None:
        """Relevance [B, S, h, w] of every position to every subject becomes the masks in force."""
        for generation, r in zip(generations, relevance, strict=True):
            scopes = [s.scope_ratio for s in generation.request.subjects]
            generation.set_masks(guidance_masks(r[: len(scopes)], scopes, self.method))

    def generation_branch(self, generations: Sequence[Generation]) -> list[Tensor]:
        """Text and subjects inside their masks, with classifier-free guidance (Eq. 16, 17, 19); outputs per image."""
        recorded = [g for g in generations if g.records_next_mask]
        conditional = [*recorded, *(g for g in generations if not g.records_next_mask)]
        free = [g for g in conditional if g.negative_text is not None]  # those with an unconditional row
        outputs, relevance = self.predict(
            [*conditional, *free],
            [g.text for g in conditional] + [g.negative_text for g in free],
            vision=self._visual_attention(conditional, free),
            recorder=self._recorder(recorded) if recorded else None,
        )
        if relevance is not None:
            self.set_masks(recorded, relevance)
        output = dict(zip(map(id, conditional), outputs, strict=False))
        unconditional = dict(zip(map(id, free), outputs[len(conditional) :], strict=True))

        def guided(generation: Generation) -> Tensor:
            noise_text = output[id(generation)]
            if generation.negative_text is None:
                return noise_text
            noise_uncond = unconditional[id(generation)]
            return noise_uncond + generation.request.guidance_scale * (noise_text - noise_uncond)

        return [guided(generation) for generation in generations]

    def _visual_attention(
        self, generations: Sequence[Generation], free: Sequence[Generation]
    ) -> VisualAttention | None:
        seen = [(row, g, g.references) for row, g in enumerate(generations) if g.references]
        unconditional = enumerate(free, start=len(generations))
        seen += [(row, g, g.negative_references) for row, g in unconditional if g.negative_references]
        if not seen:
            return None
        inside = {}
        for level in set(self.attention.levels.values()):
            height, width = self.sizes(generations[0])[level]
            parts = [g.sparse_masks((height, width), self.method.mask_resize) for _, g, _ in seen]
            inside[level] = SparseMask.stack(parts, [row * height * width for row, _, _ in seen])
        return VisualAttention(keys_values=[kv for _, _, references in seen for kv in references], inside=inside)

    def predict(
        self,
        rows: Sequence[Generation],
        texts: Sequence[TextCondition],
        vision: VisualAttention | None = None,
        recorder: AttentionRecorder | None = None,
        output_wanted: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One UNet call, a row per generation and text.

        Returns:
            the output, fp32 [R, channels, height, width], unless it is not wanted; and of a recorded call the relevance
            of every position to every subject, fp32 [B, S, h, w].
        """
        dtype = self.unet.conv_in.weight.dtype
        added = None
        if texts[0].pooled is not None:
            added = {
                "text_embeds": torch.stack([t.pooled for t in texts]).to(dtype),
                "time_ids": torch.stack([g.time_ids for g in rows]).to(dtype),
            }
        known = all(t.keys_values is not None for t in texts)
        keys_values = [t.keys_values for t in texts] if known else ()
        with self.attention.attention_context(
            text=keys_values,
            vision=vision,
            recordings=recorder and recorder.layers,
            stop_after_recording=not output_wanted and self.allow_early_exit,
        ):
            return self._call(
                torch.stack([g.model_input() for g in rows]).to(dtype),
                torch.stack([g.timestep for g in rows]),
                torch.stack([t.embeds for t in texts]).to(dtype),
                added,
                recorder,
                self.sizes(rows[0]),
                output_wanted,
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
        output_wanted: bool,
        programs: str,
    ) -> tuple[Tensor | None, Tensor | None]:
        """All of a call that is tensors alone; compiled, it computes nothing that it does not return."""
        torch._check(programs is not None)  # its guards compare what a program has read
        try:
            output = self.unet(
                sample, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False
            )[0]
        except StopForward:
            output = None
        relevance = recorder and recorder.relevance(sizes, self.method.mask_normalization)
        return output.float() if output_wanted else None, relevance

    def sizes(self, generation: Generation) -> list[tuple[int, int]]:
        """(h, w) of each level of the UNet."""
        return level_sizes(*generation.latents.shape[-2:], len(self.unet.config.down_block_types))


def _pad_rows(tokens: Tensor, num_rows: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, num_rows - len(tokens)))
