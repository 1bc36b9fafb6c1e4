"""The page: title, model description, and one tab per task."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from serving.clients import Client, Limits, ModelInfo

from .tabs import build_tab
from .task import EXAMPLES_FOLDER, TASKS
from .theme import CSS, THEME

SCRIPT = Path(__file__).with_name("page.js")
CACHE_CHECK_S, CACHE_AGE_S = 600, 3600  # uploads and results are deleted an hour after their creation

INTRODUCTION = """# RealCustom++
Upload an image of a subject, enter a prompt, and **select the word** that the subject replaces. The subject changes
only the part of the image that shows this word; the prompt controls the rest."""


def build_demo(client: Client, info: ModelInfo) -> gr.Blocks:
    """The page for a loaded model; `launch_demo` serves it."""
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


def launch_demo(
    page: gr.Blocks,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    middleware: Sequence[Middleware] = (),
    mcp: bool = False,
) -> str:
    """Start to serve the page and return its address. `page.close()` ends it.

    Args:
        limits: upper bounds on uploaded files.
        port: None selects a free port.
        middleware: of the page's web application.
        mcp: also serve the tabs as tools of the Model Context Protocol, at `/gradio_api/mcp/`.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        app_kwargs={"middleware": list(middleware)},
        theme=THEME,
        css=CSS,
        head=f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
        allowed_paths=[str(EXAMPLES_FOLDER)],
        max_file_size=limits.max_image_bytes,
        footer_links=["api"],
        mcp_server=mcp,
        ssr_mode=False,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address.rstrip("/")


def _describe(info: ModelInfo) -> str:
    if not info.vocabulary:
        return f"Model: **{info.id}**"
    counts = " and ".join(f"{len(words)} {kind}" for kind, words in info.vocabulary.items())
    return f"Model: **{info.id}**. It knows only {counts}; other words are underlined."
