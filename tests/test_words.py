"""Target phrases: whole words, every occurrence, several tokens per word, and errors that help."""

import pytest
from tiny import TEXT_LENGTH, tiny_tokenizer

from realcustom.words import find_phrase, target_token_positions, words_of


def spelled(prompt: str, phrase: str) -> str:
    """What the marked tokens spell, without word ends."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, truncation=True, max_length=TEXT_LENGTH).input_ids
    tokens = tokenizer.convert_ids_to_tokens([ids[p] for p in target_token_positions(tokenizer, prompt, phrase)])
    return "".join(tokens).replace("</w>", " ").strip()


def test_every_occurrence_is_marked_with_all_its_tokens():
    assert spelled("a dog, the dog", "dog") == "dog dog"


@pytest.mark.parametrize("phrase", ["Dog", "DOG", " dog "])
def test_case_and_outer_blanks_do_not_matter(phrase):
    assert spelled("A dog runs", phrase) == "dog"


def test_a_phrase_of_several_words_matches_across_any_blanks():
    assert find_phrase("the red  hat", "red hat") == [(4, 12)]


@pytest.mark.parametrize("prompt", ["hotdogs for me", "a dogma", "underdog_x"])
def test_parts_of_words_are_not_words(prompt):
    with pytest.raises(ValueError, match="'dog' does not occur"):
        find_phrase(prompt, "dog")


def test_the_error_offers_the_words_there_are():
    with pytest.raises(ValueError, match="a, cat, on, the, beach"):
        find_phrase("a cat on the beach", "dog")


def test_a_phrase_beyond_the_tokenizers_limit_is_refused_by_name():
    prompt = "abcdefghij klmnopqrst uvwxyz dog"
    with pytest.raises(ValueError, match=rf"'dog' is beyond the {TEXT_LENGTH} tokens"):
        target_token_positions(tiny_tokenizer(), prompt, "dog")


@pytest.mark.parametrize("phrase", ["c++", "(dog)", "a.b", "[x]"])
def test_signs_in_a_phrase_are_taken_literally(phrase):
    assert find_phrase(f"the {phrase} here", phrase)


def test_words_keep_apostrophes_and_hyphens():
    assert words_of("the dog's T-shirt, naïve") == ["the", "dog's", "T-shirt", "naïve"]
