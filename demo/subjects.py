"""Inputs for the prompt's subjects: image slots, word chips, and a composer for models with a small vocabulary."""

from dataclasses import dataclass

import gradio as gr
from gradio.components import Component
from PIL import Image

from serving.clients import ModelInfo, words_of

from .components import side_by_side
from .task import VISIBLE_SLOTS, Example, Task

THUMBNAIL_PX = 110


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A reference image and its target words; a typed phrase covers what single words cannot express."""

    image: gr.Image
    words: gr.Radio | gr.CheckboxGroup
    phrase: gr.Textbox

    @property
    def inputs(self) -> list[Component]:
        return [self.image, self.words, self.phrase]


def build_slots(task: Task) -> list[Slot]:
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
                slots.append(_build_slot(task, index))
    if hidden := columns[VISIBLE_SLOTS:]:
        add = gr.Button("Add another subject", size="sm", elem_id=f"{task.name}-more")
        add.click(
            lambda: [*(gr.Column(visible=True) for _ in hidden), gr.Button(visible=False)], None, [*hidden, add],
            queue=False, api_visibility="private",
        )  # fmt: skip
    return slots


def _build_slot(task: Task, index: int) -> Slot:
    image = gr.Image(
        label="Subject" if task.num_slots == 1 else f"Subject {index + 1}", type="pil", image_mode=None, height=220,
        sources=["upload", "clipboard"], elem_id=f"{task.name}-image-{index}",
    )  # fmt: skip
    chips = gr.CheckboxGroup if task.multiple_words else gr.Radio
    words = chips(
        [], label="Target words" if task.multiple_words else "Target word", visible=False,
        elem_classes=["words", f"words-{index}"], elem_id=f"{task.name}-words-{index}",
    )  # fmt: skip
    phrase = gr.Textbox(
        label="Or type phrases, separated by commas" if task.multiple_words else "Or type a phrase",
        placeholder="red car", visible=False, elem_id=f"{task.name}-phrase-{index}",
    )  # fmt: skip
    return Slot(image=image, words=words, phrase=phrase)


def update_words_with_prompt(task: Task, prompt: gr.Textbox, slots: list[Slot]) -> None:
    """Show the words of the prompt as chips while it is typed; selected words that are still in it stay selected."""

    def update(text: str, *selected: str | list[str] | None) -> list:
        words = _unique_words(text)
        updates = []
        for value in selected:
            if isinstance(value, list):
                kept = [word for word in value if word in words]
            else:
                kept = value if value in words else None
            updates += [gr.update(choices=words, value=kept, visible=bool(words)), gr.update(visible=bool(words))]
        return updates

    outputs: list[Component] = []
    for slot in slots:
        outputs += [slot.words, slot.phrase]
    prompt.change(
        update, [prompt, *(slot.words for slot in slots)], outputs, queue=False, show_progress="hidden",
        api_visibility="private", trigger_mode="always_last",
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
    """Thumbnails that fill in the form. One handler sets everything, because the words need the prompt's chips."""
    if not task.examples:
        return
    outputs: list[Component] = [prompt]
    for slot in slots:
        outputs += slot.inputs
    gr.Markdown("**Examples**")
    with gr.Row(elem_classes="examples"):
        for index, example in enumerate(task.examples):
            with gr.Column(min_width=THUMBNAIL_PX * len(example.images), scale=0):
                thumbnail = gr.Image(
                    side_by_side([Image.open(path) for path in example.paths]), show_label=False, height=THUMBNAIL_PX,
                    width=THUMBNAIL_PX * len(example.images), interactive=False, container=False, buttons=[],
                )  # fmt: skip
                button = gr.Button(example.prompt, size="sm", elem_id=f"{task.name}-example-{index}")
                gr.on(
                    [button.click, thumbnail.select], lambda example=example: _example_values(task, example), None,
                    outputs, queue=False, show_progress="hidden", api_visibility="private",
                )  # fmt: skip


def _example_values(task: Task, example: Example) -> list:
    """Values of the prompt and of each slot's inputs."""
    choices = _unique_words(example.prompt)
    values: list = [example.prompt]
    for index in range(task.num_slots):
        used = index < len(example.images)
        selected = list(example.words[index]) if used else []
        value = selected if task.multiple_words else (selected[0] if selected else None)
        image = Image.open(example.paths[index]).convert("RGB") if used else None
        values += [image, gr.update(choices=choices, value=value, visible=True), gr.update(value="", visible=True)]
    return values


def _unique_words(text: str) -> list[str]:
    return list(dict.fromkeys(words_of(text)))
