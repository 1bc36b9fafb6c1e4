"""Words of a prompt that do not affect the image: outside the model's vocabulary, or beyond its token limit."""

import asyncio
import json
import logging
from dataclasses import dataclass
from html import escape
from textwrap import shorten

from serving.clients import Client, ModelInfo, QueueFull, ServerError, words_of

log = logging.getLogger(__name__)

FUNCTION_WORDS = frozenset(
    ("a", "an", "and", "at", "in", "is", "next", "of", "on", "one", "photo", "the", "to", "under", "with")
)
NUM_SPECIAL_TOKENS = 2  # start and end
SERVER_TIMEOUT_S = 1.0
MAX_REST_CHARS = 100  # shown


@dataclass(frozen=True, kw_only=True)
class PromptWords:
    """The words of a prompt, each once.

    Attributes:
        words: all of them, in order.
        unknown: words outside the model's vocabulary; empty if the model has no vocabulary.
        ignored: words that occur only beyond the token limit.
        rest: the part of the prompt beyond the token limit.
    """

    words: list[str]
    unknown: list[str]
    ignored: list[str]
    rest: str

    @classmethod
    def of(cls, prompt: str, info: ModelInfo, num_chars_read: int | None = None) -> "PromptWords":
        """Classify the words of a prompt, of which the model reads `num_chars_read` characters (None: all)."""
        num_chars_read = len(prompt) if num_chars_read is None else num_chars_read
        words = list(dict.fromkeys(words_of(prompt)))
        read = set(words_of(prompt[:num_chars_read]))
        return cls(
            words=words,
            unknown=[word for word in words if not _is_known(word, info)],
            ignored=[word for word in words if word not in read],
            rest=prompt[num_chars_read:].strip(),
        )


async def classify_words(prompt: str, client: Client, info: ModelInfo) -> PromptWords:
    """`PromptWords` of a prompt. Asks the server for the token limit if the prompt can reach it.

    If the server does not answer in time, for example because it is busy, no word is marked as ignored.

    Raises:
        InvalidRequest: the prompt is too long.
    """
    info.limits.check_text("The prompt", prompt)
    num_chars_read = None
    if len(prompt.encode()) > info.max_tokens - NUM_SPECIAL_TOKENS:  # a token has at least one byte
        try:
            length = await asyncio.wait_for(client.prompt_length(prompt), SERVER_TIMEOUT_S)
            num_chars_read = length.num_chars_read
        except (QueueFull, ServerError, asyncio.TimeoutError) as error:
            log.warning("cannot mark words beyond the token limit: %s", error or "no answer from the server")
    return PromptWords.of(prompt, info, num_chars_read)


def prompt_note(words: PromptWords, info: ModelInfo) -> str:
    """HTML: which words do not affect the image; empty if all do. `page.js` marks their chips."""
    sentences = []
    if words.unknown:
        unknown = ", ".join(f'<mark class="unknown">{escape(word)}</mark>' for word in words.unknown)
        sentences.append(f"Unknown to this model: {unknown}.")
    if words.rest:
        rest = escape(shorten(words.rest, MAX_REST_CHARS, placeholder="…"))
        sentences.append(
            f'The model reads {info.max_tokens} tokens and ignores the rest: <mark class="ignored">{rest}</mark>'
        )
    if not sentences:
        return ""
    marks = escape(json.dumps({"unknown": words.unknown, "ignored": words.ignored}), quote=True)
    return f'<div class="prompt-note" role="note" data-marks="{marks}">{"<br>".join(sentences)}</div>'


def _is_known(word: str, info: ModelInfo) -> bool:
    if not info.vocabulary:
        return True
    known = {part.lower() for phrases in info.vocabulary.values() for phrase in phrases for part in words_of(phrase)}
    return word.lower() in known | FUNCTION_WORDS
