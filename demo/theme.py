"""Theme and CSS of the page. System fonts only, so that the page loads nothing from other hosts.

The only file that uses class names of Gradio's own elements, which are not part of its API.
"""

from gradio.themes import Soft, sizes

from .mask_overlay import SUBJECT_COLORS

THEME = Soft(
    primary_hue="orange",
    secondary_hue="blue",
    neutral_hue="stone",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    radius_size=sizes.radius_lg,
)

# Chips and slots of a subject in the color of its mask.
_SUBJECT_CSS = "\n".join(
    f".words-{i} label.selected {{ background: {color} !important; border-color: {color} !important; "
    f"color: white !important; }}\n.words-{i} label.selected span {{ color: white !important; }}\n"
    f".slot-{i} {{ border-top: 4px solid {color} !important; }}"
    for i, color in enumerate(SUBJECT_COLORS)
)

# Target words of one image: the n-th selected chip has the color of the n-th mask.
_SUBJECT_CSS += "\n".join(
    f"\n.words-multiple {' ~ '.join(['label.selected'] * (i + 1))} {{ background: {color} !important; "
    f"border-color: {color} !important; color: white !important; }}"
    for i, color in enumerate(SUBJECT_COLORS)
)
_SUBJECT_CSS += "\n.words-multiple label.selected span { color: white !important; }"

CSS = f"""
.gradio-container {{ max-width: 1180px !important; margin: auto !important; }}
.words label {{ border-radius: 999px !important; padding: 6px 14px !important; cursor: pointer; }}
.words input {{ position: absolute; opacity: 0; width: 1px; height: 1px; }}
.words label:focus-within {{ outline: 2px solid var(--color-accent); }}
.words label span {{ margin-left: 0 !important; }}
.enlarged img {{ width: 100% !important; height: 100% !important; object-fit: contain !important; }}
.label-above {{ padding-top: 38px !important; }}
.enlarged .grid-wrap {{ min-height: 0 !important; }}
.enlarged .caption-label {{ font-size: var(--text-xs) !important; }}
.status .html-container {{ padding: 0 !important; }}
.status-line {{ display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; min-height: 1.6em; }}
.status-legend {{ display: flex; flex-wrap: wrap; gap: 0 12px; font-weight: 600; }}
.status-error {{ color: var(--error-text-color, #b91c1c); font-weight: 600; }}
.status-bar {{ height: 4px; margin-top: 4px; border-radius: 2px; background: var(--border-color-primary); }}
.status-bar div {{ height: 100%; border-radius: 2px; background: var(--color-accent); transition: width 0.2s; }}
.method-sliders .min_value, .method-sliders .max_value {{ display: none; }}
.icon-button-wrapper:not(:has(button, a)) {{ display: none !important; }}
.examples img {{ cursor: pointer; height: 90px; border-radius: 8px; display: block; margin: auto; }}
.examples .html-container {{ padding: 0 !important; }}
.prompt-note mark {{ background: none; color: var(--error-text-color, #b91c1c); text-decoration: underline wavy; }}
.prompt-note {{ font-size: var(--text-sm); }}
footer .divider {{ display: none !important; }}
.known {{ color: var(--body-text-color-subdued); font-size: 0.9em; }}
{_SUBJECT_CSS}
"""
