"""Inputs for the prompt's subjects: image slots, word chips, and a composer for models with a small vocabulary."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from serving.clients import Client, InvalidRequest, ModelInfo, words_of

from .components import example_card, failure_note
from .prompt_words import classify_words, prompt_note
from .task import VISIBLE_SLOTS, Example, Task
from .upload import read_upload

WORDS_SCHEMA = {"type": "array", "items": {"type": "string"}, "title": "Words of the prompt"}
CARD_PX = 150  # width of an example


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A reference image and its target words; a typed phrase covers what single words cannot express."""

    image: gr.Image
    note: gr.HTML  # why the last upload was refused
    words: gr.CheckboxGroup
    phrase: gr.Textbox

    @property
    def inputs(self) -> list[Component]:
        return [self.image, self.words, self.phrase]


def build_slots(task: Task, info: ModelInfo) -> list[Slot]:
    """The image slots of a tab; those after the first `VISIBLE_SLOTS` are shown on request."""
    slots: list[Slot] = []
    columns: list[gr.Column] = []
    with gr.Row():
        for index in range(task.num_slots):
            column = gr.Column(
                min_width=180, visible=index < VISIBLE_SLOTS,
                elem_classes=f"slot-{index}" if task.num_slots > 1 else None,
            )  # fmt: skip
            columns.append(column)
            with column:
                slots.append(_build_slot(task, info, index))
    if hidden := columns[VISIBLE_SLOTS:]:
        add = gr.Button("Add another subject", size="sm", elem_id=f"{task.name}-more")
        add.click(
            lambda: [*(gr.Column(visible=True) for _ in hidden), gr.Button(visible=False)], None, [*hidden, add],
            queue=False, api_visibility="private",
        )  # fmt: skip
    return slots


def _build_slot(task: Task, info: ModelInfo, index: int) -> Slot:
    image = gr.Image(
        label="Subject" if task.num_slots == 1 else f"Subject {index + 1}", height=260, format="png",
        sources=["upload", "clipboard"], elem_classes=["label-above", "subject-image"],
        elem_id=f"{task.name}-image-{index}",
    )  # fmt: skip
    note = gr.HTML(visible=False, elem_id=f"{task.name}-note-{index}")
    words = gr.CheckboxGroup(
        [], label="Target words" if task.multiple_words else "Target word", visible=False,
        elem_classes=["words", "words-multiple" if task.multiple_words else f"words-{index}"],
        elem_id=f"{task.name}-words-{index}",
    )  # fmt: skip
    phrase = gr.Textbox(
        label="Or type phrases, separated by commas" if task.multiple_words else "Or type a phrase",
        placeholder="red car", visible=False, max_length=info.limits.max_prompt_chars,
        elem_id=f"{task.name}-phrase-{index}",
    )  # fmt: skip
    words.api_info = lambda: WORDS_SCHEMA  # by default, an enumeration of the choices, which are empty at first

    def check(upload: Mapping[str, Any] | None) -> list:
        """Remove a file that cannot be read, and say why."""
        try:
            if upload is not None:
                read_upload(upload, info.limits)
        except InvalidRequest as error:
            return [None, gr.HTML(failure_note(str(error)), visible=True)]
        return [gr.skip(), gr.HTML("", visible=False)]

    image.upload(
        check, image, [image, note], preprocess=False, queue=False, show_progress="hidden", api_visibility="private"
    )
    # Either words or a phrase. A group of checkboxes and not of radio buttons, so that a word can be deselected.
    selected = "words" if task.multiple_words else "words.slice(-1)"
    words.input(
        None, [words, phrase], [words, phrase], js=f"(words, phrase) => [{selected}, words.length ? '' : phrase]"
    )
    # `input` comes before the value of the text box has changed; `change` also follows a click on an example.
    phrase.blur(None, [words, phrase], [words, phrase], js="(words, phrase) => [phrase.trim() ? [] : words, phrase]")
    return Slot(image=image, note=note, words=words, phrase=phrase)


def update_words_with_prompt(
    client: Client, info: ModelInfo, prompt: gr.Textbox, note: gr.HTML, slots: list[Slot]
) -> None:
    """Show the words of the prompt as chips while it is typed; selected words that are still in it stay selected.

    Args:
        note: shows which words the model does not know or does not read.
    """

    async def update(text: str | None, *selected: list[str] | None) -> list:
        try:
            classified = await classify_words(text or "", client, info)
        except InvalidRequest as error:  # the text box limits the length; a longer prompt comes from another client
            return [gr.HTML(failure_note(str(error)), visible=True)] + [gr.skip()] * (2 * len(selected))
        words, marked = classified.words, prompt_note(classified, info)
        updates: list = [gr.HTML(marked, visible=bool(marked))]
        for value in selected:
            kept = [word for word in value or [] if word in words]
            updates += [gr.update(choices=words, value=kept, visible=bool(words)), gr.update(visible=bool(words))]
        return updates

    outputs: list[Component] = [note]
    for slot in slots:
        outputs += [slot.words, slot.phrase]
    # Without preprocessing, which refuses a selected word that the chips of a faster prompt no longer have.
    prompt.change(
        update, [prompt, *(slot.words for slot in slots)], outputs, preprocess=False, queue=False,
        show_progress="hidden", api_visibility="private", trigger_mode="always_last",
    )  # fmt: skip


def build_composer(task: Task, info: ModelInfo, prompt: gr.Textbox) -> None:
    """Chips of the model's vocabulary that write the prompt; for models with subjects and scenes in it."""
    if not {"subjects", "scenes"} <= info.vocabulary.keys():
        return
    multiple = task.num_slots > 1 or task.multiple_words
    subject_names, scene_names = info.vocabulary["subjects"], info.vocabulary["scenes"]
    with gr.Accordion("Compose a prompt", open=False, elem_id=f"{task.name}-compose"):
        chips = gr.CheckboxGroup if multiple else gr.Radio
        subjects = chips(
            subject_names, show_label=False, container=False, elem_classes="words",
            elem_id=f"{task.name}-known-subjects",
        )  # fmt: skip
        scene = gr.Radio(
            scene_names, show_label=False, container=False, elem_classes="words", elem_id=f"{task.name}-known-scenes"
        )

    def compose(selected: str | list[str] | None, scene: str | None) -> str:
        names = selected if isinstance(selected, list) else [selected] if selected else []
        subject = " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)
        return " ".join(part for part in (subject, scene) if part)

    gr.on(
        [subjects.input, scene.input], compose, [subjects, scene], prompt, queue=False, show_progress="hidden",
        api_visibility="private", trigger_mode="always_last",
    )  # fmt: skip


def build_examples(task: Task, prompt: gr.Textbox, slots: list[Slot]) -> None:
    """Cards that fill in the form. One handler sets everything, because the words need the prompt's chips."""
    if not task.examples:
        return
    outputs: list[Component] = [prompt]
    for slot in slots:
        outputs += [*slot.inputs, slot.note]
    gr.Markdown("**Examples**")
    with gr.Row(elem_classes="examples"):
        for index, example in enumerate(task.examples):
            with gr.Column(min_width=CARD_PX, scale=0, elem_classes="example"):
                gr.HTML(example_card(example.paths, [word for words in example.words for word in words]))
                gr.Button(example.prompt, size="sm", elem_id=f"{task.name}-example-{index}").click(
                    lambda example=example: _example_values(task, example), None, outputs, queue=False,
                    show_progress="hidden", api_visibility="private",
                )  # fmt: skip


def _example_values(task: Task, example: Example) -> list:
    """Values of the prompt, and of each slot's inputs and note."""
    choices = _unique_words(example.prompt)
    values: list = [example.prompt]
    for index in range(task.num_slots):
        used = index < len(example.images)
        values += [
            example.paths[index] if used else None,
            gr.update(choices=choices, value=list(example.words[index]) if used else [], visible=True),
            gr.update(value="", visible=True),
            gr.update(value="", visible=False),
        ]
    return values


def _unique_words(text: str) -> list[str]:
    return list(dict.fromkeys(words_of(text)))
