"""Target phrases: whole words, all occurrences, several tokens per word, and error messages."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import TEXT_LENGTH, tiny_tokenizer

from realcustom.words import find_phrase, prompt_length, target_token_positions, tokenize, words_of

HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940"  # combining marks that have no composed form


def marked_text(prompt: str, phrase: str) -> str:
    """The text of the marked tokens, with a space at each word end."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, truncation=True, max_length=TEXT_LENGTH).input_ids
    tokens = tokenizer.convert_ids_to_tokens([ids[p] for p in target_token_positions(tokenizer, prompt, phrase)])
    return "".join(tokens).replace("</w>", " ").strip()


def test_all_tokens_of_all_occurrences_are_marked():
    """Every occurrence of the phrase is marked with all of its tokens."""
    assert marked_text("a dog, the dog", "dog") == "dog dog"


@pytest.mark.parametrize("phrase", ["Dog", "DOG", " dog "])
def test_case_and_surrounding_whitespace_are_ignored(phrase):
    """The phrase matches in any case and with whitespace around it."""
    assert marked_text("A dog runs", phrase) == "dog"


def test_whitespace_in_a_phrase_matches_any_run_of_whitespace():
    """A phrase of several words is found across any amount of whitespace between them."""
    assert find_phrase("the red  hat", "red hat") == [(4, 12)]


@pytest.mark.parametrize("prompt", ["hotdogs for me", "a dogma", "underdog_x"])
def test_parts_of_words_do_not_match(prompt):
    """A phrase that only occurs inside longer words raises a ValueError."""
    with pytest.raises(ValueError, match="'dog' does not occur"):
        find_phrase(prompt, "dog")


def test_error_lists_the_words_of_the_prompt():
    """The error for a phrase that does not occur lists the words that do."""
    with pytest.raises(ValueError, match="a, cat, on, the, beach"):
        find_phrase("a cat on the beach", "dog")


def test_phrase_beyond_the_token_limit_raises():
    """A phrase in the truncated part of the prompt raises a ValueError that names the phrase and the limit."""
    prompt = "abcdefghij klmnopqrst uvwxyz dog"
    with pytest.raises(ValueError, match=rf"'dog' is beyond the {TEXT_LENGTH} tokens"):
        target_token_positions(tiny_tokenizer(), prompt, "dog")


@pytest.mark.parametrize(
    "prompt,num_tokens,read,last",
    [
        ("a dog", 6, "a dog", None),
        ("a dog on a mat and a very red kite", 27, "a dog on a mat and a very red k", "the word 'red'"),
        ("a dog on a mat and a very old dog too", 29, "a dog on a mat and a very old d", "the word 'old'"),
        ("x" * 60, 62, "x" * 22, "less than one word"),
        ("  ", 2, "", None),
    ],
)
def test_where_the_token_limit_falls(prompt, num_tokens, read, last):
    """The length of a prompt counts all tokens and names the last whole word that the text encoder reads."""
    length = prompt_length(tiny_tokenizer(), prompt)
    assert length.num_tokens == num_tokens and length.max_tokens == TEXT_LENGTH
    assert prompt[: length.num_chars_read] == read
    warning = length.warning("prompt", prompt)
    assert (warning is None) if last is None else (warning is not None and last in warning)


def test_threads_can_share_a_tokenizer(monkeypatch):
    """The length of a prompt is computed with other options than its encoding, which runs in another thread."""
    tokenizer, prompt = tiny_tokenizer(), 20 * "a dog "
    set_options = type(tokenizer).set_truncation_and_padding

    def set_options_and_wait(self, *args, **options) -> None:
        set_options(self, *args, **options)
        time.sleep(0.005)  # another thread could change the options now, before they are used

    monkeypatch.setattr(type(tokenizer), "set_truncation_and_padding", set_options_and_wait)
    options = dict(padding="max_length", max_length=TEXT_LENGTH, truncation=True)
    with ThreadPoolExecutor() as pool:
        counting = pool.submit(lambda: [prompt_length(tokenizer, prompt) for _ in range(10)])
        lengths = {len(tokenize(tokenizer, prompt, **options).input_ids) for _ in range(20)}
        assert lengths == {TEXT_LENGTH}
        assert {length.num_tokens for length in counting.result()} == {82}


@pytest.mark.parametrize("phrase", ["c++", "(dog)", "a.b", "[x]"])
def test_special_characters_match_literally(phrase):
    """Characters with a meaning in regular expressions match themselves."""
    assert find_phrase(f"the {phrase} here", phrase)


def test_words_keep_apostrophes_and_hyphens():
    """Apostrophes, hyphens and accented letters are parts of a word."""
    assert words_of("the dog's T-shirt, naïve") == ["the", "dog's", "T-shirt", "naïve"]


@pytest.mark.parametrize(
    "prompt,phrase,found",
    [
        ("a cafe\u0301 here", "caf\u00e9", "cafe\u0301"),
        ("a caf\u00e9 here", "cafe\u0301", "caf\u00e9"),
        ("the dog\u2019s bed", "dog's", "dog\u2019s"),
        ("the dog's bed", "dog\u2019s", "dog's"),
        ("a \uff24\uff2f\uff27 runs", "dog", "\uff24\uff2f\uff27"),
        ("STRASSE", "stra\u00dfe", "STRASSE"),
        ("\u6d77\u6ee9\u4e0a\u7684\u732b\u5728\u8dd1", "\u732b", "\u732b"),
        (f"{HINDI} text", HINDI, HINDI),
        ("aa a a", "a a", "a a"),
    ],
)  # fmt: skip
def test_unicode_variants_match(prompt, phrase, found):
    """Normalization form, apostrophe, width and case do not matter; spans refer to the prompt as it is."""
    ((start, end),) = find_phrase(prompt, phrase)
    assert prompt[start:end] == found


@pytest.mark.parametrize("prompt,phrase", [("a cafe\u0301", "cafe"), ("na\u00efvety", "na\u00efve")])
def test_words_are_not_split_before_combining_marks(prompt, phrase):
    """A letter with a combining mark is another letter, and a prefix is not a word."""
    with pytest.raises(ValueError, match="does not occur"):
        find_phrase(prompt, phrase)


def test_many_combining_marks_take_linear_time():
    """100,000 combining marks, whose normalization at once takes minutes, are searched in less than a few seconds."""
    prompt = "a" + "\u0301\u0323" * 50_000 + " dog"
    start = time.process_time()
    assert find_phrase(prompt, "dog") == [(len(prompt) - 3, len(prompt))]
    assert time.process_time() - start < 5


def test_words_keep_combining_marks():
    """Words in Devanagari and decomposed Latin are not cut at their combining marks."""
    assert words_of(f"{HINDI} cafe\u0301's") == [HINDI, "cafe\u0301's"]
