"""Pieces of HTML that the sections of the report are made of."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape


def pairs(rows: Mapping[str, str]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<table class="pairs"><tbody>{body}</tbody></table>' if body else ""


def listed(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def scroll(label: str, content: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def picture(png: bytes, hint: str) -> str:
    return f'<figure><img class="chart" alt="{escape(hint)}" src="{data_uri(png, "png")}"></figure>'


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
