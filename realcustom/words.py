"""Target phrase -> character spans -> token positions, for all occurrences of the phrase as whole words."""

import re

# A word is a run of letters and digits, with inner apostrophes and hyphens ("dog's", "t-shirt").
_WORD = re.compile(r"\w+(?:['’\-]\w+)*")


def words_of(prompt: str) -> list[str]:
    """The words of a prompt in order, including repetitions."""
    return _WORD.findall(prompt)


def find_phrase(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Character spans [start, end) of every occurrence of `phrase` in `prompt` as whole words, ignoring case.

    Whitespace inside the phrase matches any run of whitespace. "dog" is found in "the dog's bed", not in "hotdog".

    Raises:
        ValueError: the phrase is empty or does not occur; the message lists the words of the prompt.
    """
    parts = phrase.split()
    if not parts:
        raise ValueError(f"target_phrase is empty; name a word of the prompt: {_list_words(prompt)}.")
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, parts)) + r"(?!\w)"
    spans = [match.span() for match in re.finditer(pattern, prompt, flags=re.IGNORECASE)]
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


def encode_offsets(tokenizer, prompt: str) -> list[tuple[int, int]]:
    """Character span of each token of `prompt`, truncated at the tokenizer's limit; special tokens have (0, 0)."""
    encoded = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True)
    return [tuple(span) for span in encoded["offset_mapping"]]


def shorten(text: str, max_chars: int = 100) -> str:
    """The repr of a text for an error message, with the middle omitted if it is longer than `max_chars`."""
    if len(text) > max_chars:
        text = f"{text[: max_chars // 2]} … {text[-max_chars // 2 :]}"
    return repr(text)


def _list_words(prompt: str, max_words: int = 30) -> str:
    words = list(dict.fromkeys(word for word in words_of(prompt[:10_000]) if len(word) <= 50))
    if not words:
        return "none (the prompt has no words)"
    return ", ".join(words[:max_words]) + (", …" if len(words) > max_words else "")
