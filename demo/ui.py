"""The page: title, what the model knows, and the three tabs."""

from pathlib import Path

import gradio as gr

from serving.clients import Client, ModelInfo

from .tabs import Task, build_tab

EXAMPLES = Path(__file__).resolve().parent.parent / "assets" / "examples"


def _example(name: str) -> str:
    return str(EXAMPLES / f"{name}.png")


TASKS = (
    Task(
        name="One2One",
        text="**One image, one word.** The subject of your image becomes one word of the prompt.",
        num_slots=1,
        many_words=False,
        examples=(
            ((_example("dog"),), "a dog on the beach", (("dog",),)),
            ((_example("robot"),), "a robot in the jungle", (("robot",),)),
            ((_example("penguin"),), "a penguin in the city", (("penguin",),)),
        ),
    ),
    Task(
        name="One2Many",
        text="**One image, several words.** Each word you click takes its own subject from the same image.",
        num_slots=1,
        many_words=True,
        examples=(((_example("cat_and_car"),), "a cat and a car in the snow", (("cat", "car"),)),),
    ),
    Task(
        name="Many2Many",
        text="**Several images, several words.** Every image becomes a word of its own color.",
        num_slots=3,
        many_words=False,
        examples=(
            ((_example("dog"), _example("robot")), "a dog and a robot on the beach", (("dog",), ("robot",))),
            (
                (_example("penguin"), _example("teapot")),
                "a penguin and a teapot in the jungle",
                (("penguin",), ("teapot",)),
            ),
        ),
    ),
)


def build_demo(client: Client, info: ModelInfo) -> gr.Blocks:
    """Lay out the page for a loaded model. Give `demo.theme.THEME` and `CSS` to `launch`."""
    with gr.Blocks(title="RealCustom++", analytics_enabled=False, fill_width=False) as page:
        gr.Markdown(
            "# RealCustom++\nGive an image of a subject, write a prompt, and **click the word** the subject should "
            "become. It appears only where that word lives in the image; everything else follows the text."
        )
        if info.vocabulary:
            counts = " and ".join(f"{len(words)} {kind}" for kind, words in info.vocabulary.items())
            gr.Markdown(
                f"The model **{info.id}** is small enough for a laptop and was trained in a made world of {counts}. It "
                "knows only the words offered under each prompt, and no photographs; these need a full-size model.",
                elem_classes="known",
            )
        else:
            gr.Markdown(f"Model: **{info.id}**", elem_classes="known")
        for task in TASKS:
            with gr.Tab(task.name, id=task.name):
                build_tab(task, client, info)
    # Handlers only wait for replicas, so any number of visitors may be waiting at once.
    page.queue(default_concurrency_limit=None, max_size=256)
    return page
