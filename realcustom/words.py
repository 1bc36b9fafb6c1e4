"""Target phrase -> character spans -> token positions, for all occurrences of the phrase as whole words."""

import re
import threading
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

# Scripts that are written without spaces between words: Thai, Lao, Khmer, Hiragana, Katakana, Han.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_TOKENIZER_LOCK = threading.Lock()
_APOSTROPHES = str.maketrans("’‘ʼ＇", "''''")
_MAX_CLUSTER = 32  # characters that are normalized together; the time is quadratic in the number of combining marks


def words_of(prompt: str) -> list[str]:
    """The words of a prompt in order, including repetitions.

    A word is a run of letters, digits and combining marks, with inner apostrophes and hyphens ("dog's", "t-shirt").
    """
    words, start = [], None
    for index, char in enumerate(prompt):
        if _is_word_char(char):
            start = index if start is None else start
        elif start is not None and not (
            char in "'’-" and index + 1 < len(prompt) and _is_word_char(prompt[index - 1] + prompt[index + 1])
        ):
            words.append(prompt[start:index])
            start = None
    if start is not None:
        words.append(prompt[start:])
    return words


def find_phrase(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Character spans [start, end) of every occurrence of `phrase` in `prompt` as whole words.

    Case, Unicode normalization (composed, decomposed, full-width) and the shape of apostrophes are ignored. Whitespace
    inside the phrase matches any run of whitespace. "dog" is found in "the dog's bed", not in "hotdog". In scripts
    without spaces between words, such as Chinese, any position may start or end a word.

    Raises:
        ValueError: the phrase is empty or does not occur; the message lists the words of the prompt.
    """
    parts = _fold(phrase)[0].split()
    if not parts:
        raise ValueError(f"target_phrase is empty; name a word of the prompt: {_list_words(prompt)}.")
    text, starts, ends = _fold(prompt)
    words = r"\s+".join(map(re.escape, parts))
    pattern = re.compile(f"(?=({words}))")  # the lookahead finds overlapping matches
    spans, reached = [], 0
    for match in pattern.finditer(text):
        begin, end = match.span(1)
        if begin >= reached and _is_boundary(text, begin) and _is_boundary(text, end):
            spans.append((starts[begin], ends[end - 1]))
            reached = end
    if not spans:
        raise ValueError(
            f"target_phrase {shorten(phrase)} does not occur in the prompt {shorten(prompt)} as whole words; "
            f"the words are: {_list_words(prompt)}."
        )
    return spans


def target_token_positions(tokenizer, prompt: str, phrase: str) -> list[int]:
    """Positions of the tokens of `phrase` in `prompt`; the start token is position 0.

    Args:
        tokenizer: a fast tokenizer of transformers (one that reports character offsets).
        prompt: the text to encode, truncated at `tokenizer.model_max_length`.
        phrase: one or more whole words of it.
    Returns:
        Ascending positions over all occurrences within the tokenizer's limit.
    Raises:
        ValueError: the phrase does not occur, or only beyond the limit.
    """
    spans = find_phrase(prompt, phrase)
    offsets = encode_offsets(tokenizer, prompt)
    positions = [
        position
        for position, (start, end) in enumerate(offsets)
        if start < end and any(start < stop and end > begin for begin, stop in spans)
    ]
    if not positions:
        limit = tokenizer.model_max_length
        reach = max((end for _, end in offsets), default=0)
        raise ValueError(
            f"target_phrase {shorten(phrase)} is beyond the {limit} tokens that the text encoder reads; "
            f"shorten the prompt or move the phrase forward. Words within the limit: {_list_words(prompt[:reach])}."
        )
    return positions


def tokenize(tokenizer, text: str | list[str], **options):
    """Call a tokenizer with one text or several, one thread at a time.

    A fast tokenizer of transformers keeps the options of a call in shared state, so a call of another thread could pad
    or truncate with the wrong ones.
    """
    with _TOKENIZER_LOCK:
        return tokenizer(text, **options)


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A text in which each word of a textual inversion with several vectors is followed by its other tokens.

    Attributes:
        text: the text to encode, such as "a <t> <t>_1 <t>_2" for "a <t>".
        replaced: (start, end) of each such word in the original and of its tokens in `text`.
    """

    text: str
    replaced: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()

    def original_span(self, span: tuple[int, int]) -> tuple[int, int]:
        """The span in the original of a token's span in `text`; a special token has (0, 0)."""
        start, end = span
        shift = 0
        for original, expanded in self.replaced:
            if start < end and expanded[0] <= start < expanded[1]:
                return original
            if start >= expanded[1]:
                shift = expanded[1] - original[1]
        return start - shift, end - shift


def expand_added_tokens(tokenizer, text: str) -> Expansion:
    """Expand the words of textual inversions with several vectors, as `maybe_convert_prompt` of diffusers does.

    Such a word "<t>" is stored as the added tokens "<t>", "<t>_1", "<t>_2", ...
    """
    added = tokenizer.get_added_vocab()
    others = {token: [] for token in added if f"{token}_1" in added}
    if not others:
        return Expansion(text=text)
    for token, parts in others.items():
        while (part := f"{token}_{len(parts) + 1}") in added:
            parts.append(part)
    by_id = {added[token]: parts for token, parts in others.items()}
    encoded = tokenize(tokenizer, text, return_offsets_mapping=True, verbose=False)
    expanded, replaced, copied = "", [], 0
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token_id in by_id:
            expanded += text[copied:start]
            begin = len(expanded)
            expanded += " ".join([text[start:end], *by_id[token_id]])
            replaced.append(((start, end), (begin, len(expanded))))
            copied = end
    return Expansion(text=expanded + text[copied:], replaced=tuple(replaced))


def encode_offsets(tokenizer, prompt: str) -> list[tuple[int, int]]:
    """Character span of each token of `prompt`, truncated at the tokenizer's limit; special tokens have (0, 0)."""
    limit, expansion = tokenizer.model_max_length, expand_added_tokens(tokenizer, prompt)
    encoded = tokenize(tokenizer, expansion.text, truncation=True, max_length=limit, return_offsets_mapping=True)
    return [expansion.original_span(span) for span in encoded["offset_mapping"]]


@dataclass(frozen=True, kw_only=True)
class PromptLength:
    """How much of a prompt the text encoder reads.

    Attributes:
        num_tokens: tokens of the whole prompt, including the start and end tokens.
        max_tokens: tokens that the text encoder reads.
        num_chars_read: characters of the prompt that are read; the rest is ignored.
    """

    num_tokens: int
    max_tokens: int
    num_chars_read: int

    def warning(self, name: str, prompt: str) -> str | None:
        """The sentence that names where the limit falls in the field `name`; None if the prompt is within it."""
        rest = prompt[self.num_chars_read :].strip()
        if not rest:
            return None
        words = words_of(prompt[: self.num_chars_read])
        if words and _is_word_char(prompt[self.num_chars_read - 1 : self.num_chars_read + 1]):
            words.pop()  # read in part
        last = f"up to the word {shorten(words[-1])}" if words else "less than one word"
        return (
            f"{name} has {self.num_tokens} tokens; the text encoder reads {self.max_tokens}, {last}. Shorten it; this "
            f"part is ignored: {shorten(rest)}."
        )


def prompt_length(tokenizer, prompt: str) -> PromptLength:
    """How much of `prompt` is within the limit of a fast tokenizer of transformers."""
    expanded = expand_added_tokens(tokenizer, prompt).text
    return PromptLength(
        num_tokens=len(tokenize(tokenizer, expanded, truncation=False, verbose=False).input_ids),
        max_tokens=tokenizer.model_max_length,
        num_chars_read=max((end for _, end in encode_offsets(tokenizer, prompt)), default=0),
    )


def shorten(text: str, max_chars: int = 100) -> str:
    """The repr of a text for an error message, with the middle omitted if it is longer than `max_chars`."""
    if len(text) > max_chars:
        text = f"{text[: max_chars // 2]} … {text[-max_chars // 2 :]}"
    return repr(text)


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can represent a text: not if it contains half of a surrogate pair, such as of a cut emoji."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _is_word_char(text: str) -> bool:
    return all(char.isalnum() or char == "_" or unicodedata.category(char).startswith("M") for char in text)


def _is_boundary(text: str, index: int) -> bool:
    """Whether a word may start or end between the characters before and at `index`."""
    if index in (0, len(text)):
        return True
    before, after = text[index - 1], text[index]
    if unicodedata.category(after).startswith("M"):  # a combining mark belongs to the character before it
        return False
    return not (_is_word_char(before) and _is_word_char(after)) or bool(
        _UNSPACED.match(before) or _UNSPACED.match(after)
    )


@lru_cache(maxsize=16)
def _fold(text: str) -> tuple[str, list[int], list[int]]:
    """Fold a text for comparison. Also returns the start and end in `text` of each folded character."""
    folded: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < min(len(text), start + _MAX_CLUSTER) and unicodedata.combining(text[end]):
            end += 1
        cluster = unicodedata.normalize("NFKC", text[start:end]).casefold().translate(_APOSTROPHES)
        folded.append(cluster)
        starts += [start] * len(cluster)
        ends += [end] * len(cluster)
        start = end
    return "".join(folded), starts, ends


def _list_words(prompt: str, max_words: int = 30) -> str:
    words = list(dict.fromkeys(word for word in words_of(prompt[:10_000]) if len(word) <= 50))
    if not words:
        return "none (the prompt has no words)"
    return ", ".join(words[:max_words]) + (", …" if len(words) > max_words else "")
