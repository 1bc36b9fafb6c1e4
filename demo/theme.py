"""Theme and CSS of the page. System fonts only, so that the page loads nothing from other hosts.

Text has a contrast of at least 4.5:1 in light and dark mode; Gradio's own theme has 2.4:1 in places.

The only file that uses class names of Gradio's own elements, which are not part of its API.
"""

from gradio.themes import Soft, sizes

from .mask_overlay import SUBJECT_COLORS, text_color

THEME = Soft(
    primary_hue="orange",
    secondary_hue="blue",
    neutral_hue="stone",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    radius_size=sizes.radius_lg,
).set(
    background_fill_primary="*neutral_50",  # of Soft; `set` resets it
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_300",
    block_label_text_color="*primary_800",
    block_label_background_fill_dark="*primary_800",
    block_title_text_color="*primary_800",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    color_accent="*primary_700",
)

# Chips and slots of a subject in the color of its mask.
_SUBJECT_CSS = "\n".join(
    f".words-{i} label.selected {{ background: {color} !important; border-color: {color} !important; "
    f"color: {text_color(color)} !important; }}\n"
    f".slot-{i} {{ border-top: 4px solid {color} !important; }}"
    for i, color in enumerate(SUBJECT_COLORS)
)

# Target words of one image: the n-th selected chip has the color of the n-th mask.
_SUBJECT_CSS += "\n".join(
    f"\n.words-multiple {' ~ '.join(['label.selected'] * (i + 1))} {{ background: {color} !important; "
    f"border-color: {color} !important; color: {text_color(color)} !important; }}"
    for i, color in enumerate(SUBJECT_COLORS)
)

CSS = f"""
:root {{ --mark-color: #b91c1c; }}
.dark {{ --mark-color: #fca5a5; --color-accent: #fb923c; }}
.gradio-container {{ max-width: 1180px !important; margin: auto !important; }}
.words label {{ border-radius: 999px !important; padding: 6px 14px !important; cursor: pointer; }}
.words input {{ position: absolute; opacity: 0; width: 1px; height: 1px; }}
.words label:focus-within {{ outline: 2px solid var(--color-accent); }}
.words label span {{ margin-left: 0 !important; color: inherit !important; }}
.words label.unknown {{ text-decoration: underline wavy var(--mark-color) !important; }}
.words label.ignored {{ text-decoration: line-through !important; }}
.enlarged img {{ width: 100% !important; height: 100% !important; object-fit: contain !important; }}
.label-above {{ padding-top: 38px !important; }}
.enlarged .grid-wrap {{ min-height: 0 !important; }}
.enlarged .image-container .icon-button-wrapper.top-panel {{ top: -34px !important; }}
.enlarged .thumbnail-item {{ display: flex !important; flex-direction: column; aspect-ratio: auto !important; }}
.enlarged .thumbnail-item img {{ height: auto !important; flex: 1; }}
.enlarged .caption-label {{ position: static !important; max-width: 100% !important; white-space: normal !important;
  font-size: var(--text-xs) !important; }}
.status .html-container {{ padding: 0 !important; }}
.status-line {{ display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; min-height: 1.6em; }}
.status-legend {{ display: flex; flex-wrap: wrap; gap: 0 12px; font-weight: 600; }}
.status-error {{ color: var(--mark-color); font-weight: 600; }}
.status-bar {{ height: 4px; margin-top: 4px; border-radius: 2px; background: var(--border-color-primary); }}
.status-bar div {{ height: 100%; border-radius: 2px; background: var(--color-accent); transition: width 0.2s; }}
.method-sliders .min_value, .method-sliders .max_value {{ display: none; }}
.icon-button-wrapper:not(:has(button, a)) {{ display: none !important; }}
.examples img {{ cursor: pointer; height: 90px; border-radius: 8px; display: block; margin: auto; }}
.examples .html-container {{ padding: 0 !important; }}
.prompt-note mark {{ background: none; color: var(--mark-color); }}
.prompt-note mark.unknown {{ text-decoration: underline wavy; }}
.prompt-note mark.ignored {{ text-decoration: line-through; }}
.prompt-note {{ font-size: var(--text-sm); }}
footer .divider {{ display: none !important; }}
.known {{ color: var(--body-text-color-subdued); font-size: 0.9em; }}
{_SUBJECT_CSS}
"""
