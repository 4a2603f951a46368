"""Render the HTML pages of templates/; each page has its images inside and needs no other file.

write_atomic(path, render("evaluation.html", title="medgen: evaluation", findings=findings, ...))

Every value is escaped, so text from outside, such as a file name, is never markup.
"""

import base64
from pathlib import Path
from typing import Any


def render(template: str, **values: Any) -> bytes:
    """The page that a template gives for the values it uses."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # most commands render no page

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values).encode()


def data_uri(content: bytes, kind: str) -> str:
    """An image file of that kind (png, jpeg, gif) as the value of an `img` element's `src`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
