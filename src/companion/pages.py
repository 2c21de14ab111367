"""Pages: notebooks and figures as HTML. Each file is complete: it runs no script and asks no host for anything."""

from __future__ import annotations

import base64
import functools
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

# An executed notebook may print anything: none of it may run, or ask another host for something.
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; font-src data:; base-uri 'none'; "
    "form-action 'none'"
)

# The HTML that survives nbconvert's sanitiser, whose own list lacks headings, paragraphs and the heads of tables.
_TAGS = {
    "a", "b", "blockquote", "br", "caption", "code", "col", "colgroup", "dd", "del", "div", "dl", "dt", "em",
    "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong",
    "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
}  # fmt: skip
_ATTRIBUTES = {"*": ["class"], "a": ["href"], "td": ["colspan", "rowspan"], "th": ["colspan", "rowspan", "scope"]}
_SHOWN = {"image/png", "text/html", "text/markdown", "text/latex", "text/plain"}


def write(file: Path, content: str | bytes) -> Path:
    """Write a file so that a reader sees the old one or the new one, and a full disk leaves the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        os.chmod(new, 0o644)
        os.replace(new, file)
    except BaseException:
        os.unlink(new)
        raise
    return file


def render(template: str, **values: object) -> str:
    """A page from one of the package's templates; every value is escaped."""
    import jinja2

    text = (Path(__file__).parent / "templates" / template).read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text).render(**values)


def figures(out: Path, notebook: str) -> list[dict[str, str]]:
    """A notebook's figures in the order it drew them: name, title and caption, and the picture in base64."""
    from PIL import Image, UnidentifiedImageError

    found = []
    files = (out / "figures").glob(f"{notebook.split('_')[0]}_*.png")
    for file in sorted(files, key=lambda f: f.stat().st_mtime_ns):
        try:
            with Image.open(file) as image:
                text = image.info
        except (OSError, UnidentifiedImageError):  # cut off by a full disk: its notebook has reported that
            continue
        encoded = base64.b64encode(file.read_bytes()).decode()
        found.append({"name": file.stem, "base64": encoded, "title": text.get("Title", file.stem),
                      "caption": text.get("Description", "")})  # fmt: skip
    return found


def title(notebook) -> str:
    """The first heading of a notebook."""
    heading = re.search(r"^# +(.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
    return heading.group(1) if heading else ""


def as_html(path: Path) -> str:
    """An executed notebook as one page."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    _leave_out_widgets(notebook)
    # nbconvert's own page without the scripts that it would ask other hosts for.
    page = "{% extends 'lab/index.html.j2' %}"
    for block in ("html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets"):
        page += f"{{% block {block} %}}{{% endblock %}}"
    page += f'{{% block html_head_js %}}<meta http-equiv="Content-Security-Policy" content="{POLICY}">{{% endblock %}}'
    return _export(notebook, path.stem, page)


class Cells(NamedTuple):
    """A notebook's cells as safe HTML; their sources by anchor; its main figure; the names of figures shown in it."""

    html: str
    sources: dict[str, str]
    main_figure: str
    shown: set[str]


def cells(path: Path, figures: list[dict[str, str]]) -> Cells:
    """An executed notebook as a part of a page: without its title, code folded, outputs in sight.

    A picture of one of ``figures`` gets that figure's title and caption as its text.
    """
    import markupsafe
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    titles = {f["name"]: f"{f['title']}. {f['caption']}" for f in figures}
    _leave_out_widgets(notebook)
    sources, shown = {}, set()
    if notebook.cells and notebook.cells[0].cell_type == "markdown":
        notebook.cells[0].source = re.sub(r"\A# .*\n*", "", notebook.cells[0].source)  # the page has it
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{cell.get('id') or number}"
        sources[cell.id] = cell.source
        cell.metadata = {}
        named = [name for name in re.findall(r"""["']([\w-]+)["']""", cell.source) if name in titles]
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.metadata = {"image/png": {"alt": titles[named[0]] if named else "Drawn by the cell above"}}
                shown.update(named[:1])
    page = "{% extends 'basic/index.html.j2' %}"
    page += '{% block any_cell %}<div id="{{ cell.id }}">{{ super() }}</div>{% endblock %}'
    page += '{% block input_group %}<details class="code"><summary>code</summary>{{ super() }}</details>{% endblock %}'
    html = _export(notebook, path.stem, page)
    main = notebook.metadata.get("companion", {}).get("main_figure", "")
    return Cells(markupsafe.Markup(html), sources, main, shown)


def _leave_out_widgets(notebook) -> None:
    """Keep the outputs that a page without a kernel and scripts can show."""
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            # A widget leaves its fallback HTML, or else only its name, which says nothing.
            if "application/vnd.jupyter.widget-view+json" in data and "text/html" not in data:
                data.pop("text/plain", None)
            for kind in set(data) - _SHOWN:
                del data[kind]
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]


_EXPORTING = threading.Lock()  # notebooks that end side by side share the exporters


def _export(notebook, name: str, page: str) -> str:
    with _EXPORTING:
        return _exporter(page).from_notebook_node(notebook, {"metadata": {"name": name}})[0]


@functools.cache
def _exporter(page: str):
    """nbconvert's exporter with this template, which it compiles once."""
    import jinja2
    from nbconvert import HTMLExporter

    return HTMLExporter(
        template_file="page.html.j2", extra_loaders=[jinja2.DictLoader({"page.html.j2": page})], sanitize_html=True,
        filters={"clean_html": _clean}, exclude_input_prompt=True, exclude_output_prompt=True,
        exclude_anchor_links=True,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)  # a cell is cleaned for its notebook's page, and for the report
def _clean(html: str) -> str:
    """nbconvert's filter: balance tags, and show as text every tag that could act, hide or leave its place."""
    import bleach

    html = re.sub(r"<(style|script)\b.*?</\1\s*>", "", str(html), flags=re.IGNORECASE | re.DOTALL)
    return bleach.clean(html, tags=_TAGS, attributes=_ATTRIBUTES, protocols={"http", "https"})
