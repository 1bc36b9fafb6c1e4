"""Words of a prompt that the model was not trained on, for models with a small vocabulary."""

from html import escape

from serving.clients import ModelInfo, words_of

FUNCTION_WORDS = frozenset(
    ("a", "an", "and", "at", "in", "is", "next", "of", "on", "one", "photo", "the", "to", "under", "with")
)


def unknown_words(prompt: str, info: ModelInfo) -> list[str]:
    """Words of the prompt outside the model's vocabulary, each once; empty if the model has no vocabulary."""
    if not info.vocabulary:
        return []
    known = {word.lower() for phrases in info.vocabulary.values() for phrase in phrases for word in words_of(phrase)}
    known |= FUNCTION_WORDS
    return [word for word in dict.fromkeys(words_of(prompt)) if word.lower() not in known]


def mark_unknown_words(prompt: str, info: ModelInfo) -> str:
    """HTML: the prompt's words with the unknown ones marked; empty if all are known."""
    unknown = set(unknown_words(prompt, info))
    if not unknown:
        return ""
    words = " ".join(f"<mark>{escape(word)}</mark>" if word in unknown else escape(word) for word in words_of(prompt))
    return f'<div class="prompt-note" role="note">Unknown to this model: {words}</div>'
