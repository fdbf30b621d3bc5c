"""A comparison as one HTML file: nothing is fetched, no script runs, and what the models wrote is text wherever it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from localrl.comparison.rows import Answer, Comparison, Mean, Row
from localrl.comparison.table import signed

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --front: #1d1f23; --soft: #666b74; --line: #dcdde0; --card: #ffffff;
        --bar: #4a7fc1; --better: #1d7a46; --worse: #b3402a; --cut: #92600a; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --front: #e6e7ea; --soft: #9aa0aa; --line: #33363d; --card: #1e2126;
          --bar: #6b9bd8; --better: #5fc48d; --worse: #ef8a72; --cut: #d9a441; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 90rem; background: var(--back); color: var(--front);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); font-size: .86rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0 0; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; min-width: 36rem; width: 100%; }
th, td { text-align: left; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; font-variant-numeric: tabular-nums; }
th { font-weight: 600; font-size: .86rem; color: var(--soft); } td:first-child { font-weight: 600; }
svg { display: block; width: 100%; min-width: 6rem; max-width: 12rem; height: 10px; margin-top: .2rem; }
svg .track { fill: var(--line); } svg .bar { fill: var(--bar); } svg .whisker { stroke: var(--front); stroke-width: 2; }
details { border: 1px solid var(--line); border-radius: 8px; background: var(--card); margin: 0 0 .9rem; }
summary { cursor: pointer; padding: .7rem 1rem; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
summary .soft { font-weight: 400; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); border-top: 1px solid var(--line); overflow: hidden; }
.answers > section { padding: .7rem 1rem 1rem; box-shadow: 1px 1px 0 var(--line); min-width: 0; }
.answers h3 { font-size: .86rem; margin: 0 0 .4rem; color: var(--soft); }
pre { margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.chip { display: inline-block; margin: 0 .9rem .1rem 0; font-size: .86rem; font-variant-numeric: tabular-nums; }
.better { color: var(--better); } .worse { color: var(--worse); } .cut { color: var(--cut); }
@media print { body { background: none; } details { break-inside: avoid; } }
"""


def page(found: Comparison) -> str:
    """The whole file. Light or dark as the reader's system is."""
    title = escape(f"{found.facts.get('run', 'models')}: {' · '.join(found.models)}")
    facts = "".join(f"<dt class=soft>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in found.facts.items())
    rows = "\n".join(_row(found, row) for row in found.rows)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<div class=soft>The same prompts and the same seeds to every model, through llama.cpp.</div>
<dl>{facts}</dl>
<h2>Means over {len(found.rows)} prompts</h2>
{_summary(found)}
<h2>Answers</h2>
{rows}
</body>
</html>
"""


def _summary(found: Comparison) -> str:
    several = len(found.names) > 1 or found.weights != (1.0,)
    summaries = {model: found.summary(model) for model in found.models}
    columns: dict[str, list[Mean]] = {name: [s.rewards[i] for s in summaries.values()] for i, name in enumerate(found.names)}
    if found.names and several:
        columns["reward (weighted sum)"] = [s.total for s in summaries.values()]
    gains = bool(found.names) and len(found.models) > 1
    headings = ["model", *columns, *([f"over {found.models[0]}"] if gains else []), "tokens", "ended", "tok/s"]
    lines = []
    for number, (model, summary) in enumerate(summaries.items()):
        cells = [f"{escape(str(column[number]))}{_bar(column[number], column)}" for column in columns.values()]
        if gains:
            cells.append("" if number == 0 else f"<span class={_tone(summary.gain)}>{escape(signed(str(summary.gain)))}</span>")
        cells += [f"{summary.tokens:.0f}", f"{summary.done:.0%}", f"{summary.tokens_per_second:,.0f}"]
        lines.append(f"<tr><td>{escape(model)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    note = "<p class=soft>±: twice the standard error over the prompts; the gain is that of each prompt over the first model, then averaged.</p>"
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{note if found.names else ''}"


def _bar(one: Mean, column: Sequence[Mean]) -> str:
    """From zero to the mean, with a whisker of twice the standard error, on the column's own scale."""
    ends = [end for m in column if not math.isnan(m.value) for end in (m.value - _half(m), m.value + _half(m))]
    if math.isnan(one.value) or not ends:
        return ""
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = 100 / (high - low) if high > low else 0.0

    def at(value: float) -> float:
        return round((value - low) * scale, 2)

    left, right = sorted((at(0.0), at(one.value)))
    whisker = f"<line class=whisker x1={at(one.value - _half(one))} x2={at(one.value + _half(one))} y1=5 y2=5 />" if _half(one) else ""
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class=track width=100 height=10 rx=2 />'
        f"<rect class=bar x={left} width={round(right - left, 2)} height=10 rx=2 />{whisker}</svg>"
    )


def _half(one: Mean) -> float:
    return 0.0 if math.isnan(one.error) else 2 * one.error


def _tone(gain: Mean) -> str:
    """Better or worse only where the interval leaves zero."""
    return "better" if gain.value > _half(gain) else "worse" if gain.value < -_half(gain) else "soft"


def _row(found: Comparison, row: Row) -> str:
    first = row.answers[found.models[0]]
    answers = "".join(_answer(found, model, row.answers[model], first) for model in found.models)
    known = ", ".join(f"{key}: {value}" for key, value in row.prompt.columns.items())
    beside = f" <span class=soft>{escape(known[:200])}</span>" if known else ""
    return f"<details open><summary>{escape(row.question)}{beside}</summary><div class=answers>{answers}</div></details>"


def _answer(found: Comparison, model: str, answer: Answer, first: Answer) -> str:
    chips = [_chip(name, answer.rewards[i], first.rewards[i]) for i, name in enumerate(found.names)]
    chips.append(f"<span class='chip soft'>{answer.tokens} tokens</span>")
    if not answer.done:
        chips.append("<span class='chip cut'>cut at the limit</span>")
    return f"<section><h3>{escape(model)}</h3><pre>{escape(answer.text.strip())}</pre>{''.join(chips)}</section>"


def _chip(name: str, value: float, first: float) -> str:
    if math.isnan(value):
        return f"<span class='chip soft'>{escape(name)} -</span>"
    sign = "better" if value > first else "worse" if value < first else "soft"
    mark = {"better": " ▲", "worse": " ▼", "soft": ""}[sign]
    return f"<span class='chip {sign}'>{escape(name)} {value:.2f}{mark}</span>"
