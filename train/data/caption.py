"""Caption files -> caption and target phrase."""

import json

from realcustom.words import find_phrase, is_encodable, words_of

from .sample import BrokenRecord

MAX_BYTES = 65_536


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_MEDIA = _set("photo photograph picture image painting drawing illustration portrait view shot closeup close-up")
_DETERMINERS = _set("a an the this that these those my your his her its our their one two three some")
_ENDS = _set(
    "of in on at by with without from to into onto over under above below near beside behind between against through "
    "and or but while as is are was were be being has have who which that for next wearing"
)


def parse_caption(text: bytes | None, record: bytes | None, key: str, subject: str | None = None) -> tuple[str, str]:
    """Caption and target phrase of a record.

    Args:
        text: content of the .txt file, a caption.
        record: content of the .json file, an object. Its `caption` has precedence over the .txt file. Its
            `target_phrase` is one or more whole words of the caption; without it, `guess_target_phrase` is used.
        key: for errors.
        subject: target phrase without a `target_phrase`, if the caption contains it.
    Raises:
        BrokenRecord: there is no caption, a file is not valid, or the phrase does not occur in the caption.
    """
    values = _parse_json(record, key) if record is not None else {}
    caption, phrase = values.get("caption"), values.get("target_phrase")
    if caption is None and text is not None:
        caption = _decode_text(text, key)
    for name, value in (("caption", caption), ("target_phrase", phrase)):
        if not isinstance(value, str | None):
            raise BrokenRecord("bad caption", key, f"{name} is {type(value).__name__}, not text")
        if value and not is_encodable(value):  # tokenizers refuse it
            raise BrokenRecord("bad caption", key, f"{name} contains half of a surrogate pair")
    caption = " ".join((caption or "").split())
    if not words_of(caption):
        raise BrokenRecord("captionless", key)
    if phrase is None:
        return caption, subject if subject and _problem(caption, subject) is None else guess_target_phrase(caption)
    if problem := _problem(caption, phrase):
        raise BrokenRecord("bad caption", key, problem)
    return caption, " ".join(phrase.split())


def _problem(caption: str, phrase: str) -> str | None:
    """Why a phrase cannot be the target phrase of a caption, or None."""
    try:
        find_phrase(caption, phrase)
    except ValueError as error:
        return str(error)
    return None


def names_sides(caption: str) -> bool:
    """Whether a caption would be wrong for the mirrored image."""
    return not {"left", "right"}.isdisjoint(word.casefold() for word in words_of(caption))


def guess_target_phrase(caption: str) -> str:
    """The word that probably names the subject: the last word of the first noun phrase, for example "dog" in "a photo
    of a brown dog sitting on a bench".

    The noun phrase starts after words such as "a photo of" and articles. It ends at punctuation, at a preposition,
    conjunction or auxiliary verb, and at a word in -ing that one of these or an article follows. This is a rule for
    English; give `target_phrase` in the .json file where it is not good enough.
    """
    words = words_of(caption)
    folded = [word.casefold() for word in words]
    first = 0
    for index in range(min(4, len(words) - 1)):
        if folded[index] in _MEDIA and folded[index + 1] == "of":
            first = index + 2
            break
    while first < len(words) - 1 and folded[first] in _DETERMINERS | _ENDS:
        first += 1
    first = min(first, len(words) - 1)
    gaps = _gaps(caption, words)
    last = first
    for index in range(first + 1, len(words)):
        after = folded[index + 1] if index + 1 < len(words) else "of"
        verb = folded[index].endswith("ing") and after in _ENDS | _DETERMINERS
        if gaps[index].strip() or folded[index] in _ENDS | _DETERMINERS or verb:
            break
        last = index
    return words[last]


def _gaps(caption: str, words: list[str]) -> list[str]:
    """The text between each word and the word before it."""
    gaps, end = [], 0
    for word in words:
        start = caption.index(word, end)
        gaps.append(caption[end:start])
        end = start + len(word)
    return gaps


def _parse_json(record: bytes, key: str) -> dict:
    try:
        values = json.loads(_decode_text(record, key))
    except (ValueError, RecursionError) as error:
        raise BrokenRecord("bad caption", key, f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BrokenRecord("bad caption", key, "the JSON file is not an object")
    return values


def _decode_text(data: bytes, key: str) -> str:
    if len(data) > MAX_BYTES:
        raise BrokenRecord("bad caption", key, f"the file has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenRecord("bad caption", key, str(error)) from None
