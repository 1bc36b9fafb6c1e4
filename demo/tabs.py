"""One tab: inputs on the left, results on the right, and the event that forwards a request to the server."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import fields
from inspect import Parameter, Signature
from textwrap import shorten
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from serving.clients import Client, InvalidRequest, Limits, ModelInfo, QueueFull, Request, ServerError

from .components import failure, progress, tiled
from .controls import Controls, build_controls
from .form import read_form
from .generation_state import GenerationState, generate_images
from .mask_overlay import overlay_masks
from .subjects import build_composer, build_examples, build_slots, update_words_with_prompt
from .task import Task

log = logging.getLogger(__name__)

MAX_GALLERY_IMAGES = 32  # each result has two: the image and its masks
MAX_CAPTION_CHARS = 80  # of the prompt in captions and alternative texts
ERROR_DURATION_S = 10


def build_tab(task: Task, client: Client, info: ModelInfo) -> None:
    """Lay out one tab and connect its events."""
    gr.Markdown(task.text)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5):
            prompt = gr.Textbox(
                label="Prompt", placeholder="a dog on the beach", lines=1, max_lines=4, elem_id=f"{task.name}-prompt",
                max_length=info.limits.max_prompt_chars,
            )  # fmt: skip
            prompt_note = gr.HTML(visible=False, elem_id=f"{task.name}-prompt-note")
            build_composer(task, info, prompt)
            slots = build_slots(task, info)
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", elem_id=f"{task.name}-generate")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{task.name}-stop")
            controls = build_controls(task.name, info)
        with gr.Column(scale=6):
            status = gr.HTML(progress("Ready", 0), label="Status", elem_classes="status", elem_id=f"{task.name}-status")
            with gr.Row():
                live, masks = (
                    gr.Image(
                        label=label, interactive=False, format="png", height=338, buttons=["download", "fullscreen"],
                        elem_classes=["enlarged", "label-above"], elem_id=f"{task.name}-{name}",
                    )
                    for label, name in (("Image", "live"), ("Guidance masks", "masks"))
                )  # fmt: skip
            gallery = gr.Gallery(
                label="Results, newest first", columns=4, height="auto", object_fit="contain", format="png",
                type="filepath", interactive=False, buttons=["download", "fullscreen"], visible=False,
                elem_classes=["enlarged", "label-above"], elem_id=f"{task.name}-gallery",
            )  # fmt: skip
            # Not states, so that users of the API receive them.
            results = gr.Gallery(
                label="Results: each image and its guidance masks", format="png", type="filepath", visible=False
            )
            first_seed = gr.Textbox(label="Seed of the first image", visible=False)
            latest = gr.State([])
            with gr.Row():
                reuse_seed = gr.Button("Reuse the seed", size="sm", interactive=False, elem_id=f"{task.name}-reuse")
                use_result = gr.Button(
                    "Use the image as subject", size="sm", interactive=False, elem_id=f"{task.name}-use"
                )
    build_examples(task, prompt, slots)
    update_words_with_prompt(client, info, prompt, prompt_note, slots)

    async def handle_generate(*values: Any) -> AsyncGenerator[list, None]:
        async with aclosing(generate_updates(task, client, info.limits, values)) as updates:
            async for update in updates:
                yield update

    inputs: list[Component] = [prompt]
    for slot in slots:
        inputs += slot.inputs
    inputs += controls.inputs
    handle_generate.__name__ = task.name.lower()  # of the tool for MCP clients
    handle_generate.__signature__ = _api_signature(task)  # type: ignore[attr-defined]
    start = gr.on(
        [generate.click, prompt.submit], _archive, [latest, gallery], [latest, gallery, live, masks], queue=False,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    # Without preprocessing, which refuses unreadable images and words of API users before `handle_generate` runs.
    event = start.then(
        handle_generate, inputs, [status, live, masks, results, first_seed, reuse_seed, generate, stop],
        preprocess=False, concurrency_limit=None, show_progress="hidden", api_name=task.name.lower(),
        api_description=f"{task.text.replace('**', '')} Yields updates of the page; the last one has the results.",
    )  # fmt: skip
    event.success(
        _add_results, [results, gallery], [latest, gallery, use_result], queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    # In a second event, after the first has cancelled the generation: an earlier update could arrive after "Stopped".
    stop.click(None, cancels=[event], queue=False, api_visibility="private").then(
        lambda: [progress("Stopped", 0), *_buttons(running=False)], None, [status, generate, stop], queue=False,
        api_visibility="private",
    )  # fmt: skip
    reuse_seed.click(lambda seed: seed, first_seed, controls.seed, queue=False, api_visibility="private")
    use_result.click(  # also possible by dragging a result, see `page.js`
        lambda results: [results[0][0], gr.HTML("", visible=False)], results, [slots[0].image, slots[0].note],
        queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip


def _api_signature(task: Task) -> Signature:
    """Names of the inputs under "Use via API", and which are optional; settings default to the page's values."""
    names = ["prompt"]
    for index in range(task.num_slots):
        suffix = f"_{index + 1}" if task.num_slots > 1 else ""
        names += [f"image{suffix}", f"target_words{suffix}", f"phrase{suffix}"]
    names += [field.name for field in fields(Controls)]
    required = 2  # the prompt and the first image
    return Signature(
        [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=Parameter.empty if index < required else None)
            for index, name in enumerate(names)
        ]
    )


def _archive(latest: list, gallery: list | None) -> list:
    """Move the latest result to the gallery, so that it is not shown twice; values of latest, gallery, image, masks."""
    items = [*latest, *(gallery or [])][:MAX_GALLERY_IMAGES]
    return [[], gr.Gallery(items, visible=bool(items)), None, None]


def _add_results(results: list, gallery: list | None) -> list:
    """Values of latest, gallery and the button "Use the image as subject".

    A single result is shown already; several are shown as tiles of one image.
    """
    use_result = gr.Button(interactive=True)
    if len(results) <= 2:
        return [results, gr.skip(), use_result]
    return [[], gr.Gallery([*results, *(gallery or [])][:MAX_GALLERY_IMAGES], visible=True), use_result]


async def generate_updates(
    task: Task, client: Client, limits: Limits, values: Sequence[Any]
) -> AsyncGenerator[list, None]:
    """Forward the form to the server.

    Yields values of status, image, masks, results, first seed, its button, and the Generate and Stop buttons. Work on
    images runs in threads, so that it does not delay other visitors.

    Args:
        values: see `form.read_form`.
    Raises:
        gr.Error: the request failed. The page is updated before that; Gradio keeps the last update of a failed event.
    """
    try:
        yield [progress("Starting…", 0), *_skip(5), *_buttons(running=True)]
        request, num_images = await asyncio.to_thread(read_form, task, values, limits)
        async with aclosing(_updates(client, request, num_images)) as updates:
            async for update, done in updates:
                yield [*update, *_buttons(running=not done)]
    except Exception as error:
        message = str(error)
        if not isinstance(error, InvalidRequest | QueueFull | ServerError):
            log.exception("Unexpected error in the demo")
            message = "Internal error; see the log of the demo."
        yield [failure(message), *_skip(5), *_buttons(running=False)]
        raise gr.Error(message, duration=ERROR_DURATION_S, print_exception=False) from error


async def _updates(client: Client, request: Request, num_images: int) -> AsyncGenerator[tuple[list, bool], None]:
    """Values of status, image, masks, results, first seed and its button; and whether generation is done."""
    words = [subject.target_phrase for subject in request.subjects]
    shown: list[Image.Image | None] = []
    async with aclosing(generate_images(client, request, num_images)) as states:
        async for state in states:
            live = masks = gr.skip()  # most updates have no new preview
            images = [image.image for image in state.images]
            if state.done or not shown or any(new is not old for new, old in zip(images, shown, strict=True)):
                live, masks = await asyncio.to_thread(_draw_previews, state)
                shown = images
            status = progress(state.status(), state.fraction, words, _description(state, request.prompt))
            if state.done:
                results = await asyncio.to_thread(_draw_results, state, request.prompt, words)
                yield [status, live, masks, results, str(state.images[0].seed), gr.Button(interactive=True)], True
            else:
                yield [status, live, masks, *_skip(3)], False


def _draw_previews(state: GenerationState) -> tuple[Image.Image | None, Image.Image | None]:
    """All images, and all images with their masks, each as one image."""
    overlays = [image.image and overlay_masks(image.image, image.masks) for image in state.images]
    return tiled([image.image for image in state.images]), tiled(overlays)


def _description(state: GenerationState, prompt: str) -> str:
    """Alternative text of the image or of the preview."""
    text = repr(shorten(prompt, MAX_CAPTION_CHARS, placeholder="…"))
    if not state.done:
        return f"Preview for {text}"
    seeds = [str(image.seed) for image in state.images]
    return f"Result for {text}, seed {seeds[0]}" if len(seeds) == 1 else f"Results for {text}, seeds {', '.join(seeds)}"


def _draw_results(state: GenerationState, prompt: str, words: Sequence[str]) -> list[tuple[Image.Image, str]]:
    """Image and masks of each result for the gallery, with captions, which are also their alternative texts."""
    results = []
    text = repr(shorten(prompt, MAX_CAPTION_CHARS, placeholder="…"))
    for image in state.images:
        assert image.image is not None
        results.append((image.image, f"Result for {text}, seed {image.seed}"))
        overlay = overlay_masks(image.image, image.masks)
        results.append((overlay, f"Guidance masks of {' and '.join(words)}, seed {image.seed}"))
    return results


def _buttons(*, running: bool) -> list[gr.Button]:
    """State of the Generate and Stop buttons."""
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]


def _skip(count: int) -> list:
    """Leave this many outputs unchanged."""
    return [gr.skip()] * count
