"""The sampling settings that every tab shows."""

from dataclasses import dataclass, fields

import gradio as gr
from gradio.components import Component

from serving.clients import ModelInfo

from .sizes import default_size, size_choices

MAX_IMAGES = 4  # per click
SIZE_SCHEMA = {"type": "string", "title": "Size: <width>x<height> in pixels"}
MIN_SLIDER_PX = 130  # three sliders fit in one row of the left column


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The inputs, in the order in which `form.read_form` expects their values."""

    scope_ratio: gr.Slider
    early_stop_step: gr.Slider
    guidance_scale: gr.Slider
    steps: gr.Slider
    fast_masks: gr.Checkbox
    seed: gr.Textbox
    negative_prompt: gr.Textbox
    num_images: gr.Slider
    size: gr.Dropdown

    @property
    def inputs(self) -> list[Component]:
        return [getattr(self, field.name) for field in fields(self)]


def build_controls(name: str, info: ModelInfo) -> Controls:
    """The three sliders of the method and the image size, visible, and all other settings in an accordion.

    Args:
        name: prefix of the element ids.
        info: defaults and limits of the loaded model.
    """
    sampling, limits = info.sampling, info.limits
    max_steps = min(limits.max_steps, 4 * sampling.num_inference_steps)
    with gr.Row(elem_classes="method-sliders"):
        scope_ratio = gr.Slider(
            0.05, 1, sampling.scope_ratio, step=0.05, label="γ_scope", elem_id=f"{name}-scope",
            info="Mask area per subject", min_width=MIN_SLIDER_PX,
        )  # fmt: skip
        early_stop_step = gr.Slider(
            1, sampling.num_inference_steps, sampling.early_stop_step, step=1, label="T_stop",
            elem_id=f"{name}-stop-step", info="Steps with a new mask", min_width=MIN_SLIDER_PX,
        )  # fmt: skip
        guidance_scale = gr.Slider(
            1, 15, sampling.guidance_scale, step=0.5, label="CFG", elem_id=f"{name}-guidance",
            info="Prompt strength", min_width=MIN_SLIDER_PX,
        )  # fmt: skip
    with gr.Row(elem_classes="method-sliders"):
        size = gr.Dropdown(
            size_choices(info), value=default_size(info), label="Size", elem_id=f"{name}-size",
            info="Width × height in pixels", min_width=MIN_SLIDER_PX,
        )  # fmt: skip
        size.api_info = lambda: SIZE_SCHEMA  # by default, an enumeration of the choices
        num_images = gr.Slider(
            1, min(MAX_IMAGES, limits.max_images), 1, step=1, label="Images", elem_id=f"{name}-images",
            info="Per click", min_width=MIN_SLIDER_PX,
        )  # fmt: skip
    with gr.Accordion("Settings", open=False, elem_id=f"{name}-settings"):
        steps = gr.Slider(
            1, max_steps, sampling.num_inference_steps, step=1, label="Steps", elem_id=f"{name}-steps",
            info="Denoising steps; more steps add detail and take longer",
        )  # fmt: skip
        # A text box because an empty `gr.Number` becomes 0 when it is first shown.
        seed = gr.Textbox(label="Seed", info="Leave empty for a random seed", max_lines=1, elem_id=f"{name}-seed")
        negative_prompt = gr.Textbox(
            label="Negative prompt", info="What the image should not show", elem_id=f"{name}-negative"
        )
        fast_masks = gr.Checkbox(
            sampling.mask_source == "generation_branch", label="Fast masks", elem_id=f"{name}-fast",
            info="Approximate: skips the guidance branch and takes the mask from the previous step",
        )  # fmt: skip
    steps.release(  # not `change`, which also sees the first digits of a typed number
        lambda steps, stop: gr.Slider(maximum=steps, value=min(steps, stop)), [steps, early_stop_step],
        early_stop_step, queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return Controls(
        scope_ratio=scope_ratio,
        early_stop_step=early_stop_step,
        guidance_scale=guidance_scale,
        steps=steps,
        fast_masks=fast_masks,
        seed=seed,
        negative_prompt=negative_prompt,
        num_images=num_images,
        size=size,
    )
