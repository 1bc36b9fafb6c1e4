"""The page: title, model description, and one tab per task."""

import gradio as gr

from serving.clients import Client, ModelInfo

from .tabs import build_tab
from .task import TASKS

CACHE_CHECK_S, CACHE_AGE_S = 600, 3600  # uploads and results are deleted an hour after their creation

INTRODUCTION = """# RealCustom++
Upload an image of a subject, enter a prompt, and **select the word** that the subject replaces. The subject changes
only the part of the image that shows this word; the prompt controls the rest."""


def build_demo(client: Client, info: ModelInfo) -> gr.Blocks:
    """The page for a loaded model. Pass `demo.theme.THEME` and `demo.theme.CSS` to its `launch`."""
    with gr.Blocks(
        title="RealCustom++", analytics_enabled=False, fill_width=False, delete_cache=(CACHE_CHECK_S, CACHE_AGE_S)
    ) as page:
        gr.Markdown(INTRODUCTION)
        gr.Markdown(_describe(info), elem_classes="known")
        for task in TASKS:
            with gr.Tab(task.name, id=task.name):
                build_tab(task, client, info)
    # Handlers only wait for the server, so they need no limit of their own.
    page.queue(default_concurrency_limit=None, max_size=256)
    return page


def _describe(info: ModelInfo) -> str:
    if not info.vocabulary:
        return f"Model: **{info.id}**"
    counts = " and ".join(f"{len(words)} {kind}" for kind, words in info.vocabulary.items())
    return f"Model: **{info.id}**. It knows only {counts}, and no photographs; see *Compose a prompt*."
