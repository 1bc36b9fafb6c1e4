"""The three tabs. They differ only in how many images and words a visitor can give."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, fields

import gradio as gr
from PIL import Image

from serving.clients import Client, InvalidRequest, ModelInfo, QueueFull, Request, ServerError, Subject, words_of

from .components import progress, side_by_side, tiled
from .generation_state import generate_images, no_word_chosen
from .mask_overlay import overlay_masks

SLOTS_AT_FIRST = 2  # that a page shows before more are asked for
RESULTS_KEPT = 32  # views in the gallery, two of each image


@dataclass(frozen=True, kw_only=True)
class Task:
    """A tab: its name, what it says, its image slots, whether an image may become several words, and examples.

    An example is one image per slot, the prompt, and the words of each slot; it fills no slot that is not shown.
    """

    name: str
    text: str
    num_slots: int
    many_words: bool
    examples: tuple[tuple[tuple[str, ...], str, tuple[tuple[str, ...], ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Slot:
    """An image and its words; words clicked, or a phrase typed for what clicks cannot name."""

    image: gr.Image
    words: gr.Radio | gr.CheckboxGroup
    phrase: gr.Textbox


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The settings every tab shows; their order is that of `_read`."""

    scope: gr.Slider
    stop: gr.Slider
    guidance: gr.Slider
    steps: gr.Slider
    fast: gr.Checkbox
    seed: gr.Textbox
    negative: gr.Textbox
    number: gr.Slider

    @property
    def inputs(self) -> list:
        return [getattr(self, part.name) for part in fields(self)]


def build_tab(task: Task, client: Client, info: ModelInfo) -> None:
    """Lay out one tab and wire it."""
    gr.Markdown(task.text)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5):
            prompt = gr.Textbox(
                label="Prompt", placeholder="a dog on the beach", lines=1, max_lines=4, elem_id=f"{task.name}-prompt"
            )
            if {"subjects", "scenes"} <= info.vocabulary.keys():
                _build_composer(task, info, prompt)
            slots = _build_slots(task)
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", elem_id=f"{task.name}-generate")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{task.name}-stop")
            controls = _build_controls(task, info)
        with gr.Column(scale=6):
            status = gr.HTML(progress("", 0), elem_id=f"{task.name}-status")
            with gr.Row():
                live, overlay = (
                    gr.Image(
                        label=label, interactive=False, format="png", height=300, buttons=["download", "fullscreen"],
                        elem_classes="enlarged", elem_id=f"{task.name}-{name}",
                    )
                    for label, name in (("Image", "live"), ("Guidance masks", "masks"))
                )  # fmt: skip
            gallery = gr.Gallery(
                label="Results, newest first", columns=4, height="auto", object_fit="contain", format="png",
                type="filepath", interactive=False, buttons=["download", "fullscreen"], elem_classes="enlarged",
                elem_id=f"{task.name}-gallery",
            )  # fmt: skip
            made, made_seed = gr.State([]), gr.State(None)
            reuse = gr.Button("Use the seed of the first image again", size="sm", interactive=False)
    _wire_words(prompt, slots, task)
    inputs = [prompt, *(part for s in slots for part in (s.image, s.words, s.phrase)), *controls.inputs]
    outputs = [status, live, overlay, made, made_seed, reuse, generate, stop]

    async def make(*values):
        try:
            request, number = _read(task, values)
            async with aclosing(_updates(client, request, number)) as updates:
                async for update in updates:
                    yield [*update, gr.Button(interactive=False), gr.Button(interactive=True)]
        except (ValueError, QueueFull, ServerError) as error:
            raise gr.Error(str(error), duration=10) from error

    ready = lambda: (gr.Button(interactive=True), gr.Button(interactive=False))
    event = gr.on(
        [generate.click, prompt.submit], make, inputs, outputs, concurrency_limit=None, show_progress="hidden",
        api_name=task.name.lower(),
    )  # fmt: skip
    event.then(ready, None, [generate, stop], queue=False, api_visibility="private")
    event.success(
        lambda new, earlier: [*new, *(earlier or [])][:RESULTS_KEPT], [made, gallery], gallery, queue=False,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    # Said only after the event is cancelled: progress that was under way would otherwise be drawn over it.
    stop.click(None, cancels=[event], queue=False, api_visibility="private").then(
        lambda: (progress("Stopped.", 0), *ready()), None, [status, generate, stop], queue=False,
        api_visibility="private",
    )  # fmt: skip
    reuse.click(str, made_seed, controls.seed, queue=False, api_visibility="private")
    if task.examples:
        _build_examples(task, prompt, slots)


def _build_composer(task: Task, info: ModelInfo, prompt: gr.Textbox) -> None:
    """A small model's words as chips: a scene and one subject, or several, make a prompt it understands."""
    several = task.num_slots > 1 or task.many_words
    with gr.Accordion("Compose from the words this model knows", open=False, elem_id=f"{task.name}-compose"):
        kind = gr.CheckboxGroup if several else gr.Radio
        chips = dict(elem_classes="words", show_label=False, container=False)
        subjects = kind(info.vocabulary["subjects"], elem_id=f"{task.name}-known-subjects", **chips)
        scene = gr.Radio(info.vocabulary["scenes"], elem_id=f"{task.name}-known-scenes", **chips)

    def compose(chosen, place: str | None) -> str:
        names = chosen if isinstance(chosen, list) else [chosen] if chosen else []
        named = " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)
        return " ".join(part for part in (named, place) if part)

    for chip in (subjects, scene):
        chip.input(
            compose, [subjects, scene], prompt, queue=False, show_progress="hidden", api_visibility="private",
            trigger_mode="always_last",
        )  # fmt: skip


def _build_slots(task: Task) -> list[Slot]:
    slots, columns = [], []
    with gr.Row():
        for index in range(task.num_slots):
            column = gr.Column(
                min_width=180, elem_classes=f"slot-{index}" if task.num_slots > 1 else None,
                visible=index < SLOTS_AT_FIRST,
            )  # fmt: skip
            columns.append(column)
            with column:
                label = "Subject" if task.num_slots == 1 else f"Subject {index + 1}"
                image = gr.Image(
                    label=label, type="pil", image_mode=None, height=220, sources=["upload", "clipboard"],
                    elem_id=f"{task.name}-image-{index}",
                )  # fmt: skip
                kind = gr.CheckboxGroup if task.many_words else gr.Radio
                words = kind(
                    [], label="becomes the words" if task.many_words else "becomes the word",
                    elem_classes=["words", f"words-{index}"], elem_id=f"{task.name}-words-{index}", visible=False,
                )  # fmt: skip
                phrase = gr.Textbox(
                    label="or a phrase of the prompt" + (", several with commas" if task.many_words else ""),
                    placeholder="red car", elem_id=f"{task.name}-phrase-{index}", visible=False,
                )  # fmt: skip
                slots.append(Slot(image=image, words=words, phrase=phrase))
    if more := columns[SLOTS_AT_FIRST:]:
        add = gr.Button("Add another subject", size="sm", elem_id=f"{task.name}-more")
        add.click(
            lambda: [*(gr.Column(visible=True) for _ in more), gr.Button(visible=False)], None, [*more, add],
            queue=False, api_visibility="private",
        )  # fmt: skip
    return slots


def _build_controls(task: Task, info: ModelInfo) -> Controls:
    sampling, limits = info.sampling, info.limits
    with gr.Accordion("Settings", open=False, elem_id=f"{task.name}-settings"):
        scope = gr.Slider(
            0.05, 1, sampling.scope_ratio, step=0.05, label="γ_scope", elem_id=f"{task.name}-scope",
            info="Share of the image a subject may influence",
        )  # fmt: skip
        most_steps = min(limits.max_steps, 4 * sampling.num_inference_steps)
        stop = gr.Slider(
            1, most_steps, sampling.early_stop_step, step=1, label="T_stop",
            info="Steps that look for the place anew; later ones keep the last mask",
        )  # fmt: skip
        guidance = gr.Slider(
            1, 15, sampling.guidance_scale, step=0.5, label="CFG", info="How strictly the text is followed"
        )
        steps = gr.Slider(
            1, most_steps, sampling.num_inference_steps, step=1, label="Steps", elem_id=f"{task.name}-steps"
        )
        fast = gr.Checkbox(
            sampling.mask_source == "generation_branch", label="Fast masks", elem_id=f"{task.name}-fast",
            info="Approximate: no pass of their own, they follow the image one step behind",
        )  # fmt: skip
        with gr.Row():
            # Not a `gr.Number`: shown empty for the first time, Gradio's becomes 0.
            seed = gr.Textbox(label="Seed", info="Empty draws one", max_lines=1, elem_id=f"{task.name}-seed")
            number = gr.Slider(1, min(4, limits.max_images), 1, step=1, label="Images")
        negative = gr.Textbox(label="Negative prompt", placeholder="what should not be there")
    return Controls(
        scope=scope, stop=stop, guidance=guidance, steps=steps, fast=fast, seed=seed, negative=negative, number=number
    )


def _wire_words(prompt: gr.Textbox, slots: list[Slot], task: Task) -> None:
    """The prompt's words become chips as it is typed; chosen words stay chosen while they are still there."""

    def offer(text: str, *chosen):
        words = list(dict.fromkeys(words_of(text)))
        shown = bool(words)
        updates = []
        for value in chosen:
            several = [w for w in value or [] if w in words] if task.many_words else None
            kept = several if task.many_words else (value if value in words else None)
            updates += [gr.update(choices=words, value=kept, visible=shown), gr.update(visible=shown)]
        return updates

    outputs = [part for slot in slots for part in (slot.words, slot.phrase)]
    prompt.change(
        offer, [prompt, *(s.words for s in slots)], outputs, queue=False, show_progress="hidden",
        api_visibility="private", trigger_mode="always_last",
    )  # fmt: skip


def _read(task: Task, values: tuple) -> tuple[Request, int]:
    """The page's values -> request and number of images; InvalidRequest says what is missing."""
    prompt, rest = values[0] or "", values[1:]
    scope, stop, guidance, steps, fast, seed, negative, number = rest[3 * task.num_slots :]
    words = words_of(prompt)
    subjects: list[Subject] = []
    for index in range(task.num_slots):
        image, chosen, phrase = rest[3 * index : 3 * index + 3]
        phrases = _phrases(chosen, phrase, several=task.many_words)
        if image is None and not phrases:
            continue
        if image is None:
            raise InvalidRequest(f"Add an image for {phrases[0]!r}.")
        if not phrases:
            raise no_word_chosen(words)
        subjects += [Subject(image=image, target_phrase=p, scope_ratio=scope) for p in phrases]
    if not prompt.strip():
        raise InvalidRequest("Write a prompt, for example 'a dog on the beach'.")
    if not subjects:
        raise InvalidRequest("Add an image of the subject.")
    request = Request(
        prompt=prompt,
        subjects=tuple(subjects),
        negative_prompt=negative or "",
        num_inference_steps=int(steps),
        early_stop_step=min(int(stop), int(steps)),
        guidance_scale=float(guidance),
        mask_source="generation_branch" if fast else "guidance_branch",
        seed=_seed(seed),
    )
    return request, int(number)


def _seed(text: str | None) -> int | None:
    text = (text or "").strip()
    if text and not text.isdecimal():
        raise InvalidRequest(f"The seed is {text!r}; write a whole number from 0 up, or nothing to draw one.")
    return int(text) if text else None


def _phrases(chosen, phrase: str | None, *, several: bool) -> list[str]:
    """A typed phrase takes the place of clicked words."""
    if phrase and phrase.strip():
        return [p.strip() for p in (phrase.split(",") if several else [phrase]) if p.strip()]
    if several:
        return list(chosen or [])
    return [chosen] if chosen else []


async def _updates(client: Client, request: Request, number: int) -> AsyncIterator[list]:
    """Values of status, live image, overlay, results, seed and its button as the images form."""
    drawn: list[Image.Image | None] = []
    async with aclosing(generate_images(client, request, number)) as states:
        async for state in states:
            live = overlay = gr.skip()  # unless there is something new to see: most updates only count steps
            views = [p.image for p in state.images]
            if not drawn or any(view is not old for view, old in zip(views, drawn, strict=True)):
                live, drawn = tiled(views), views
                overlay = tiled([p.image and overlay_masks(p.image, p.masks) for p in state.images])
            shown_status = progress(state.status(), state.fraction)
            if state.done:
                shown = []
                for p in state.images:
                    shown += [(p.image, f"seed {p.seed}"), (overlay_masks(p.image, p.masks), "masks")]
                yield [shown_status, live, overlay, shown, state.images[0].seed, gr.Button(interactive=True)]
            else:
                yield [shown_status, live, overlay, gr.skip(), gr.skip(), gr.skip()]


def _build_examples(task: Task, prompt: gr.Textbox, slots: list[Slot]) -> None:
    """Examples fill in images, prompt and words; the words need the prompt's chips, so all are set together."""

    assert all(len(images) <= SLOTS_AT_FIRST for images, _, _ in task.examples)

    def fill(index: int):
        images, text, words = task.examples[index]
        choices = list(dict.fromkeys(words_of(text)))
        values = [text]
        for i in range(task.num_slots):
            chosen = words[i] if i < len(words) else ()
            value = list(chosen) if task.many_words else (chosen[0] if chosen else None)
            image = Image.open(images[i]).convert("RGB") if i < len(images) else None
            values += [image, gr.update(choices=choices, value=value, visible=True), gr.update(value="", visible=True)]
        return values

    outputs = [prompt, *(part for s in slots for part in (s.image, s.words, s.phrase))]
    gr.Markdown("**Examples**")
    with gr.Row():
        for index, (images, text, _) in enumerate(task.examples):
            with gr.Column(min_width=120, scale=0):
                gr.Image(
                    side_by_side([Image.open(path) for path in images]), show_label=False, height=110,
                    width=110 * len(images), interactive=False, container=False, buttons=[],
                )  # fmt: skip
                gr.Button(text, size="sm", elem_id=f"{task.name}-example-{index}").click(
                    lambda index=index: fill(index), None, outputs, queue=False, api_visibility="private"
                )
