"""Prompt -> text condition, as SDXL (two encoders, pooled text) and SD1.5 (one encoder) expect it.

Legend: T tokens, C channels of the cross-attention, D channels of the pooled text, S subjects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .keys_values import PackedKeysValues
from .words import PromptLength, expand_added_tokens, prompt_length, shorten, target_token_positions, tokenize


@dataclass(frozen=True, kw_only=True)
class TextCondition:
    """An encoded text.

    Attributes:
        embeds: [T, C].
        pooled: [D] for models that take a pooled text embedding, else None.
        keys_values: keys and values of the embeds in every cross-attention layer, each [1, T, channels]; None if the
            layers compute them in every step.
    """

    embeds: Tensor
    pooled: Tensor | None
    keys_values: PackedKeysValues | None = None


class TextEncoders:
    """One or two CLIP text encoders with their tokenizers.

    Args:
        pairs: (tokenizer, encoder), in the order in which their channels are concatenated.
        pooled_projection: see `MethodConfig.pooled_projection`.
        release: called after each encoding; offloads the encoders in the lower memory tiers.
    """

    def __init__(
        self, pairs: Sequence[tuple], *, pooled_projection: bool, release: Callable[[], None] = lambda: None
    ) -> None:
        self.pairs = tuple(pairs)
        self.pooled_projection = pooled_projection
        self._release = release

    def encode(self, text: str) -> TextCondition:
        """Encode a text: penultimate hidden states of two encoders (SDXL), last hidden state of one encoder (SD1.5).

        Tokens beyond the limit of the tokenizers are truncated. A word of a textual inversion stands for all of its
        vectors.
        """
        return self.encode_batch([text])[0]

    @torch.no_grad()
    def encode_batch(self, texts: Sequence[str]) -> list[TextCondition]:
        """Encode several texts together; see `encode`."""
        embeds, pooled = [], None
        for tokenizer, encoder in self.pairs:
            ids = tokenize(
                tokenizer,
                [expand_added_tokens(tokenizer, text).text for text in texts],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(encoder.device)
            out = encoder(ids, output_hidden_states=True)
            embeds.append(out.hidden_states[-2] if len(self.pairs) > 1 else out.last_hidden_state)
            if len(self.pairs) > 1:
                pooled = self._pool(encoder, ids, out)  # the pooled text of the last encoder is used, as in SDXL
        self._release()
        pooled_texts = [None] * len(texts) if pooled is None else pooled
        return [TextCondition(embeds=e, pooled=p) for e, p in zip(torch.cat(embeds, dim=-1), pooled_texts, strict=True)]

    def prompt_length(self, prompt: str) -> PromptLength:
        """How much of a prompt is read."""
        return prompt_length(self.pairs[0][0], prompt)

    def truncation_warnings(self, prompt: str, negative_prompt: str) -> tuple[str, ...]:
        """A sentence for each of the two texts that is beyond the text encoder's limit."""
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        warnings = (self.prompt_length(text).warning(name, text) for name, text in texts.items())
        return tuple(warning for warning in warnings if warning)

    def _pool(self, encoder, ids: Tensor, out) -> Tensor:
        if not hasattr(out, "text_embeds"):  # an encoder without projection
            return out.pooler_output
        if self.pooled_projection:
            return out.text_embeds
        # `CLIPTextModelWithProjection` does not return its pooled text without the projection, so it is computed again.
        return encoder.text_model(ids.to(out.last_hidden_state.device)).pooler_output

    def target_tokens(self, prompt: str, phrases: Sequence[str]) -> Tensor:
        """Mark the tokens of each phrase with 1, fp32 [S, T].

        Raises:
            ValueError: see `target_token_positions`, or the tokenizers differ.
        """
        tokenizer = self.pairs[0][0]
        marks = torch.zeros(len(phrases), tokenizer.model_max_length)
        for mark, phrase in zip(marks, phrases, strict=True):
            positions = target_token_positions(tokenizer, prompt, phrase)
            for other, _ in self.pairs[1:]:
                if target_token_positions(other, prompt, phrase) != positions:
                    raise ValueError(
                        f"target_phrase {shorten(phrase)} has other token positions in the second text encoder than in "
                        "the first; if the prompt has a word of a textual inversion, load it into both tokenizers and "
                        "text encoders."
                    )
            mark[positions] = 1
        return marks
