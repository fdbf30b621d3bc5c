"""How the pages look: system fonts, nothing fetched from anywhere, readable in light and dark and on a phone."""

from __future__ import annotations

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
COLOURS = ("#2563eb", "#d97706", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#be185d", "#65a30d")
"""Of curves and of reward names, in their order; told apart by lightness as well."""


def theme() -> gr.themes.Base:
    """Fonts by name only: gradio's own theme would fetch them from elsewhere."""
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO, radius_size="sm", spacing_size="md").set(
        button_primary_background_fill="#1d4ed8", button_primary_background_fill_hover="#1e40af",
        body_text_color_subdued="#52606d", body_text_color_subdued_dark="#a9b4c2",       # gradio's own are too faint to read
    )  # fmt: skip


CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.bad { color: #b91c1c; font-weight: 600; } .dark .bad { color: #fca5a5; }
.good { color: #15803d; font-weight: 600; } .dark .good { color: #86efac; }
.quiet { color: var(--body-text-color-subdued); }
.complaint { border-left: 4px solid #dc2626; padding: .4rem .8rem; background: var(--background-fill-secondary); border-radius: 4px; }
.notice { border-left: 4px solid #2563eb; padding: .4rem .8rem; background: var(--background-fill-secondary); border-radius: 4px; }
.wide { overflow-x: auto; }
.low { align-items: flex-end; }
.html-container { padding: 0 !important; }
.caption { font-size: .85rem; margin: .4rem 0; }
table.plain { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.wide table.plain, .wide table.plain * { border-top: 0 !important; border-left: 0 !important; border-right: 0 !important; }
table.plain th, table.plain td { padding: .35rem .6rem; text-align: left; border-bottom: 1px solid var(--border-color-primary); vertical-align: top; }
table.plain td.number, table.plain th.number { text-align: right; white-space: nowrap; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-family: var(--font-mono); font-size: .85rem; }
@media (max-width: 1000px) { .wide { max-width: calc(100vw - 5rem); } }
@media (max-width: 600px) { .gradio-container { padding: .5rem !important; } .wide { max-width: calc(100vw - 4rem); } }
"""

DO = """
a.do, button.do { display: inline-block; font-size: .85rem; line-height: 1.2; padding: .35rem .7rem; border-radius: 4px; cursor: pointer; text-decoration: none;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
a.do:hover, button.do:hover { border-color: #2563eb; }
a.do:focus-visible, button.do:focus-visible { outline: 2px solid #2563eb; outline-offset: 1px; }
a.do.first { background: #1d4ed8; border-color: #1d4ed8; color: #fff; font-size: 1rem; padding: .5rem 1rem; }
.badge { font-size: .8rem; font-weight: 600; padding: 0 .5rem; border-radius: 9px; border: 1px solid currentcolor; line-height: 1.5; white-space: nowrap; }
.badge.done { color: #1d4ed8; } .dark & .badge.done { color: #93c5fd; }
.bar { display: block; height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.bar > span { display: block; height: 100%; background: #2563eb; }
"""
"""Of links and buttons within a `gr.HTML` (its css_template), states and progress bars."""
