"""A board of charts, drawn by Plotly in the browser. New data redraws what is in sight and leaves zoom, scroll and what is folded as the reader has it.

(gradio's own plot is made anew with each value, and a zoom is lost with it.) The script is the one that comes with the plotly package.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import gradio as gr

from .charts import Section

SPEC = find_spec("plotly")
SCRIPT = Path(str(SPEC.origin)).parent / "package_data" / "plotly.min.js" if SPEC else Path()

CSS = """
section, details { margin: 0 0 1.2rem; }
h2 { font-size: 1.15rem; font-weight: 600; margin: .8rem 0 .4rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0; }
summary h2 { display: inline; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 12px; }
[data-key="rewards"] .cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; padding: .6rem .7rem; border: 1px solid var(--border-color-primary); border-radius: 6px; min-width: 0; }
figcaption p { margin: .1rem 0 .3rem; font-size: .8rem; line-height: 1.35; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
"""
JS = """
const root = element.querySelector('.board');
const coarse = window.matchMedia('(pointer: coarse)').matches;
const buttons = [['zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d']];
const options = { displaylogo: false, responsive: true, displayModeBar: coarse ? false : 'hover', modeBarButtons: buttons };

function draw(plot) {
  const figure = plot.waiting;
  if (!figure || !plot.inSight) return;
  plot.waiting = null;
  if (coarse) figure.layout.dragmode = false;
  Plotly.react(plot, figure.data, figure.layout, options);
}
const eyes = new IntersectionObserver(found => found.forEach(it => { it.target.inSight = it.isIntersecting; draw(it.target); }), { rootMargin: '300px' });

function make(tag, parent, text) {
  const node = parent.appendChild(document.createElement(tag));
  if (text) node.textContent = text;
  return node;
}
function child(parent, key, tag, fill) {
  let node = [...parent.children].find(it => it.dataset.key === key);
  if (!node) { node = make(tag, parent); node.dataset.key = key; fill(node); }
  return node;
}
function show() {
  const sections = props.value || [];
  const keys = new Set(sections.map(it => it.key));
  [...root.children].forEach(it => { if (!keys.has(it.dataset.key)) it.remove(); });
  for (const section of sections) {
    const box = child(root, section.key, section.folded ? 'details' : 'section', node => {
      make('h2', section.folded ? make('summary', node) : node, section.title);
      make('div', node).className = 'cards';
    });
    root.appendChild(box);
    const cards = box.querySelector('.cards');
    const wanted = new Set(section.charts.map(it => it.key));
    [...cards.children].forEach(it => { if (!wanted.has(it.dataset.key)) it.remove(); });
    for (const chart of section.charts) {
      const card = child(cards, chart.key, 'figure', node => {
        node.id = 'chart-' + chart.key.replace(/[^a-z0-9-]/gi, '_');
        const caption = make('figcaption', node);
        make('h3', caption, chart.title);
        make('p', caption, chart.caption);
        const plot = make('div', node);
        plot.className = 'plot';
        plot.style.height = chart.height + 'px';
        plot.setAttribute('role', 'group');
        eyes.observe(plot);
      });
      const plot = card.querySelector('.plot');
      const last = chart.figure.data.filter(it => it.showlegend !== false && it.y && it.y.length && typeof it.y[it.y.length - 1] === 'number');
      plot.setAttribute('aria-label', chart.title + '. ' + last.map(it => (it.name || '') + ' ' + it.y[it.y.length - 1]).join(', '));
      plot.waiting = chart.figure;
      draw(plot);
    }
  }
}
watch('value', show);
show();
"""


def board(elem_id: str) -> gr.HTML:
    """An empty one. Its value is what `shown` makes."""
    gr.set_static_paths([SCRIPT])
    return gr.HTML(
        None, html_template='<div class="board"></div>', css_template=CSS, js_on_load=JS, head=f'<script src="/gradio_api/file={SCRIPT}"></script>',
        apply_default_css=False, elem_id=elem_id,
    )  # fmt: skip


def shown(sections: Sequence[Section]) -> list[dict[str, object]]:
    """The board's value."""
    return [section.as_dict() for section in sections]
