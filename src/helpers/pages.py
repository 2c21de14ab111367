"""Pages: what a run leaves as HTML, each file whole on its own: no scripts from elsewhere, no requests."""

from __future__ import annotations

import base64
import os
import re
import tempfile
from pathlib import Path

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

    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
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


def as_html(path: Path) -> str:
    """An executed notebook as one page, without scripts."""
    import jinja2
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            # A page without scripts shows the text that a widget leaves, and nothing of one that leaves but its name.
            if data.pop("application/vnd.jupyter.widget-view+json", None) and "text/html" not in data:
                data.pop("text/plain", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
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
