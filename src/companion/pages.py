"""Pages: what a run leaves as HTML, each file whole on its own: no scripts from elsewhere, no requests."""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

# An executed notebook may print anything: whatever it is, it neither runs nor asks another host for something.
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; font-src data:; base-uri 'none'; "
    "form-action 'none'"
)


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
    files = [f for f in (out / "figures").glob(f"{notebook.split('_')[0]}_*.png") if f.is_file() and not f.is_symlink()]
    for file in sorted(files, key=lambda f: f.stat().st_mtime_ns):
        try:
            with Image.open(file) as image:
                text = image.info
        except (OSError, UnidentifiedImageError):  # cut off by a full disk: the notebook that drew it says so itself
            continue
        encoded = base64.b64encode(file.read_bytes()).decode()
        found.append({"name": file.stem, "base64": encoded, "title": text.get("Title", file.stem),
                      "caption": text.get("Description", "")})  # fmt: skip
    return found


def _leave_out_widgets(notebook, shown: Set[str] | None = None) -> None:
    """Take from its outputs what needs a kernel, and, where ``shown`` says which kinds are, all others."""
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            # A page without scripts shows the text that a widget leaves, and nothing of one that leaves but its name.
            if data.pop("application/vnd.jupyter.widget-view+json", None) and "text/html" not in data:
                data.pop("text/plain", None)
            for kind in set(data) - shown if shown else ():
                del data[kind]
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]


def as_html(path: Path) -> str:
    """An executed notebook as one page, without scripts."""
    import jinja2
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    _leave_out_widgets(notebook)
    # nbconvert's own page, less the scripts it would ask other hosts for: it opens without a network.
    blocks = ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets")
    page = "{% extends 'lab/index.html.j2' %}" + "".join(f"{{% block {b} %}}{{% endblock %}}" for b in blocks[1:])
    page += f'{{% block {blocks[0]} %}}<meta http-equiv="Content-Security-Policy" content="{POLICY}">{{% endblock %}}'
    exporter = HTMLExporter(
        template_file="offline.html.j2", extra_loaders=[jinja2.DictLoader({"offline.html.j2": page})],
        exclude_input_prompt=True, exclude_output_prompt=True, embed_images=True,
    )  # fmt: skip
    html = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})[0]
    head, start, body = html.partition("<body")
    # What no policy in a page can forbid: an output that sends the reader elsewhere, or has a host looked up.
    return head + start + re.sub(r"<(?=(?:meta|link|base)\b)", "&lt;", body, flags=re.IGNORECASE)


# What a cell's HTML may hold on a page that it shares: no more than tables, text and links.
_TAGS = {
    "a", "b", "blockquote", "br", "caption", "code", "col", "colgroup", "dd", "del", "div", "dl", "dt", "em",
    "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong",
    "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
}  # fmt: skip
_SHOWN = {"image/png", "text/html", "text/markdown", "text/latex", "text/plain"}


def _clean(html: str) -> str:
    """The HTML with its tags balanced, and those shown as text that could act, hide or leave their place."""
    import bleach

    html = re.sub(r"<(style|script)\b.*?</\1\s*>", "", html, flags=re.IGNORECASE | re.DOTALL)
    attributes = {"*": ["class"], "a": ["href"], "td": ["colspan", "rowspan"], "th": ["colspan", "rowspan", "scope"]}
    return bleach.clean(html, tags=_TAGS, attributes=attributes, protocols={"http", "https"})


class Cells(NamedTuple):
    """A notebook's cells as safe HTML; their sources by anchor; its main figure; the names of figures shown in it."""

    html: str
    sources: dict[str, str]
    main_figure: str
    shown: set[str]


def cells(path: Path, figures: list[dict[str, str]]) -> Cells:
    """An executed notebook as a part of a page: without its title, code folded, what it printed and drew in sight.

    A picture of one of ``figures`` says its finding.
    """
    import jinja2
    import markupsafe
    import nbformat
    from nbconvert import HTMLExporter

    class Exporter(HTMLExporter):
        @jinja2.pass_context
        def markdown2html(self, context, source):
            return _clean(super().markdown2html(context, source))

    notebook = nbformat.read(path, as_version=4)
    titles = {f["name"]: f"{f['title']}. {f['caption']}" for f in figures}
    _leave_out_widgets(notebook, _SHOWN)
    sources, shown = {}, set()
    if notebook.cells and notebook.cells[0].cell_type == "markdown":
        notebook.cells[0].source = re.sub(r"\A# .*\n*", "", notebook.cells[0].source)  # the page has it
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{cell.get('id') or number}"
        sources[cell.id] = cell.source
        cell.metadata = {}
        named = [name for name in re.findall(r"""["']([\w-]+)["']""", cell.source) if name in titles]
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = _clean(data["text/html"])
            if "image/png" in data:
                alt = titles[named[0]] if named else "What the cell above draws"
                output.metadata = {"image/png": {"alt": alt}}
                shown.update(named[:1])
    block = '{% block any_cell %}<div id="{{ cell.id }}">{{ super() }}</div>{% endblock %}'
    block += '{% block input_group %}<details class="code"><summary>code</summary>{{ super() }}</details>{% endblock %}'
    exporter = Exporter(
        template_file="cells.html.j2", exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True,
        extra_loaders=[jinja2.DictLoader({"cells.html.j2": "{% extends 'basic/index.html.j2' %}" + block})],
    )  # fmt: skip
    html = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})[0]
    main = notebook.metadata.get("companion", {}).get("main_figure", "")
    return Cells(markupsafe.Markup(html), sources, main, shown)
