"""Values of the page's inputs -> Request. Pure, so it is tested without Gradio."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from serving.clients import InvalidRequest, Request, Subject, words_of

from .task import Task

NUM_SLOT_VALUES = 3  # image, selected words, typed phrase


def read_form(task: Task, values: Sequence[Any]) -> tuple[Request, int]:
    """The request and the number of images to generate.

    Normalizes the reference images, which takes about 0.1 s for a large photograph: call it in a thread.

    Args:
        task: the tab.
        values: the prompt; then image, selected words and typed phrase of each slot; then the settings in the order of
            `controls.Controls`.
    Raises:
        InvalidRequest: an input is missing or invalid; the message says which one and what to do.
    """
    prompt = values[0] or ""
    scope_ratio, early_stop_step, guidance_scale, steps, fast_masks, seed, negative_prompt, num_images = values[
        1 + NUM_SLOT_VALUES * task.num_slots :
    ]
    subjects: list[tuple[Image.Image, str]] = []
    for index in range(task.num_slots):
        start = 1 + NUM_SLOT_VALUES * index
        image, selected, typed = values[start : start + NUM_SLOT_VALUES]
        phrases = _target_phrases(selected, typed, multiple=task.multiple_words)
        if image is None and not phrases:
            continue
        if image is None:
            raise InvalidRequest(f"Upload an image for {phrases[0]!r}.")
        if not phrases:
            raise _no_target_word(prompt)
        subjects += [(image, phrase) for phrase in phrases]
    if not prompt.strip():
        raise InvalidRequest("Enter a prompt, for example 'a dog on the beach'.")
    if not subjects:
        raise InvalidRequest("Upload an image of the subject.")
    try:
        request = Request(
            prompt=prompt,
            subjects=tuple(
                Subject(image=image, target_phrase=phrase, scope_ratio=scope_ratio) for image, phrase in subjects
            ),
            negative_prompt=negative_prompt or "",
            num_inference_steps=int(steps),
            early_stop_step=min(int(early_stop_step), int(steps)),
            guidance_scale=float(guidance_scale),
            mask_source="generation_branch" if fast_masks else "guidance_branch",
            seed=_seed(seed),
        )
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return request, int(num_images)


def _target_phrases(selected: str | list[str] | None, typed: str | None, *, multiple: bool) -> list[str]:
    """A typed phrase replaces selected words."""
    if typed and typed.strip():
        return [part.strip() for part in (typed.split(",") if multiple else [typed]) if part.strip()]
    if isinstance(selected, list):
        return selected
    return [selected] if selected else []


def _no_target_word(prompt: str) -> InvalidRequest:
    words = ", ".join(dict.fromkeys(words_of(prompt)))
    return InvalidRequest(f"Select the word that the subject replaces{': ' if words else ''}{words}.")


def _seed(text: str | None) -> int | None:
    text = (text or "").strip()
    if text and not text.isdecimal():
        raise InvalidRequest(f"The seed is {text!r}. Enter a whole number of at least 0, or leave it empty.")
    return int(text) if text else None
