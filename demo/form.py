"""Values of the page's inputs -> Request. Tested without a page."""

from collections.abc import Sequence
from typing import Any

from serving.clients import InvalidRequest, Limits, Request, Subject, words_of

from .controls import MAX_IMAGES
from .sizes import parse_size
from .task import Task
from .upload import read_upload

NUM_SLOT_VALUES = 3  # image, selected words, typed phrase
MAX_SEED_DIGITS = 19  # of the largest seed; longer texts are not converted


def read_form(task: Task, values: Sequence[Any], limits: Limits) -> tuple[Request, int]:
    """The request and the number of images to generate.

    Decodes the reference images, which takes up to seconds for a large photograph: call it in a thread.

    Args:
        task: the tab.
        values: the prompt; then uploaded file (see `read_upload`), selected words and typed phrase of each slot; then
            the settings in the order of `controls.Controls`. Without Gradio's preprocessing.
        limits: upper bounds on uploaded files.
    Raises:
        InvalidRequest: an input is missing or invalid; the message says which one and what to do.
    """
    prompt = _text(values[0], "The prompt", limits)
    settings = values[1 + NUM_SLOT_VALUES * task.num_slots :]
    scope_ratio, early_stop_step, guidance_scale, steps, fast_masks, seed, negative_prompt, num_images, size = settings
    negative_prompt = _text(negative_prompt, "The negative prompt", limits)
    if not prompt.strip():
        raise InvalidRequest("Enter a prompt, for example 'a dog on the beach'.")
    subjects = []
    for index in range(task.num_slots):
        start = 1 + NUM_SLOT_VALUES * index
        upload, selected, typed = values[start : start + NUM_SLOT_VALUES]
        typed = _text(typed, "The typed phrase", limits)
        phrases = _target_phrases(prompt, selected, typed, multiple=task.multiple_words)
        if upload is None and not phrases:
            continue
        if upload is None:
            raise InvalidRequest(f"Upload an image for {phrases[0]!r}.")
        if not phrases:
            raise _no_target_word(prompt)
        image = read_upload(upload, limits)
        subjects += [(image, phrase) for phrase in phrases]
    if not subjects:
        raise InvalidRequest("Upload an image of the subject.")
    try:
        number, num_steps = int(num_images), int(steps)
        width, height = parse_size(size)
        request = Request(
            prompt=prompt,
            subjects=tuple(
                Subject(image=image, target_phrase=phrase, scope_ratio=scope_ratio) for image, phrase in subjects
            ),
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_steps,
            early_stop_step=min(int(early_stop_step), num_steps),
            guidance_scale=float(guidance_scale),
            mask_source="generation_branch" if fast_masks else "guidance_branch",
            seed=_seed(seed),
        )
    except InvalidRequest:
        raise
    except (TypeError, ValueError, OverflowError) as error:  # API users may send anything in place of a number
        raise InvalidRequest(str(error)) from error
    if not 1 <= number <= MAX_IMAGES:
        raise InvalidRequest(f"The number of images is {number}. Enter a number from 1 to {MAX_IMAGES}.")
    return request, number


def _text(value: Any, name: str, limits: Limits) -> str:
    """A text of the page, after a check of its type and length; none is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is not a text but {str(value)[:40]!r}.")
    limits.check_text(name, value)
    return value


def _target_phrases(prompt: str, selected: str | list[str] | None, typed: str, *, multiple: bool) -> list[str]:
    """A typed phrase replaces selected words, which are in the order of the prompt, as the colors of their chips."""
    if typed.strip():
        return [part.strip() for part in (typed.split(",") if multiple else [typed]) if part.strip()]
    phrases = selected if isinstance(selected, list) else [selected] if selected else []
    if not all(isinstance(phrase, str) for phrase in phrases):
        raise InvalidRequest(f"The selected words are not texts but {str(phrases)[:40]!r}.")
    if len(phrases) > 1 and not multiple:
        raise InvalidRequest(f"Select one word for each image, not {len(phrases)}: {', '.join(phrases)}.")
    words = words_of(prompt)
    return sorted(filter(None, phrases), key=lambda phrase: words.index(phrase) if phrase in words else len(words))


def _no_target_word(prompt: str) -> InvalidRequest:
    words = ", ".join(dict.fromkeys(words_of(prompt)))
    return InvalidRequest(f"Select the word that the subject replaces{': ' if words else ''}{words}.")


def _seed(text: Any) -> int | None:
    text = "" if text is None else str(text).strip()
    if text and not (text.isdecimal() and len(text) <= MAX_SEED_DIGITS):
        raise InvalidRequest(
            f"The seed is {text[:40]!r}. Enter a whole number of at most {MAX_SEED_DIGITS} digits, or leave it empty."
        )
    return int(text) if text else None
