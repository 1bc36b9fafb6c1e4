"""How the page looks: system fonts only, so that it loads nothing from elsewhere."""

import gradio as gr

from .mask_overlay import SUBJECT_COLORS

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]

THEME = gr.themes.Soft(
    primary_hue="orange",
    secondary_hue="blue",
    neutral_hue="stone",
    font=FONTS,
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    radius_size=gr.themes.sizes.radius_lg,
)

_CHIP_COLORS = "\n".join(
    f".words-{i} label.selected {{ background: {color} !important; border-color: {color} !important; "
    f"color: white !important; }}\n.words-{i} label.selected span {{ color: white !important; }}\n"
    f".slot-{i} {{ border-top: 4px solid {color} !important; }}"
    for i, color in enumerate(SUBJECT_COLORS)
)

CSS = f"""
.gradio-container {{ max-width: 1180px !important; margin: auto !important; }}
.words label {{ border-radius: 999px !important; padding: 6px 14px !important; cursor: pointer; }}
.words input {{ position: absolute; opacity: 0; width: 1px; height: 1px; }}
.words label:focus-within {{ outline: 2px solid var(--color-accent); }}
.words label span {{ margin-left: 0 !important; }}
.enlarged img {{ width: 100% !important; height: 100% !important; object-fit: contain !important; }}
.enlarged .grid-wrap {{ min-height: 0 !important; }}
.stage-line {{ min-height: 1.6em; }}
.stage-bar {{ height: 4px; margin-top: 4px; border-radius: 2px; background: var(--border-color-primary); }}
.stage-bar div {{ height: 100%; border-radius: 2px; background: var(--color-accent); transition: width 0.2s; }}
.known {{ color: var(--body-text-color-subdued); font-size: 0.9em; }}
footer {{ opacity: 0.6; }}
{_CHIP_COLORS}
"""
