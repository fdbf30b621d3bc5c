"""Small pieces of HTML. Whatever comes from a model, a file or a person passes through `text` first: it is shown, never run."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def text(value: object) -> str:
    """Safe to stand in a page.

    >>> text("<script>")
    '&lt;script&gt;'
    """
    return html.escape(str(value), quote=True)


def complaint(sentence: object) -> str:
    """What went wrong, where the person looks."""
    return f'<div class="complaint" role="alert">{text(sentence)}</div>' if sentence else ""


def notice(sentence: object) -> str:
    """What one should know."""
    return f'<div class="notice" role="status">{text(sentence)}</div>' if sentence else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = (), caption: str = "") -> str:
    """Cells are escaped, unless they are `Markup`. `numbers`: columns that stand to the right. The caption does not scroll with a wide table."""
    right = set(numbers)

    def cell(tag: str, at: int, value: object) -> str:
        inner = value.html if isinstance(value, Markup) else text(value)
        return f"<{tag}{' class=number' if at in right else ''}{' scope=col' if tag == 'th' else ''}>{inner}</{tag}>"

    head = "".join(cell("th", at, name) for at, name in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", at, value) for at, value in enumerate(row)) + "</tr>" for row in rows)
    told, label = (f'<p class="caption quiet">{text(caption)}</p>', f' aria-label="{text(caption)}"') if caption else ("", "")
    return f'{told}<div class="wide" tabindex="0"><table class="plain"{label}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup:
    """HTML that was made here, out of escaped parts."""

    def __init__(self, html: str) -> None:
        self.html = html
