"""The live lab in a real JupyterLab in a real Chromium: what a user drags is what the engine does, at once."""

import ast
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest

# One server and one page for the whole module, so one worker for all of it.
pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks/10_live_lab.ipynb"
RUN_IN_KERNEL = """async ([code, expression]) => {
  const kernel = panel.sessionContext.session.kernel;
  const future = kernel.requestExecute({code, store_history: false, user_expressions: {value: expression}});
  const {content} = await future.done;
  return content.status === 'ok' ? content.user_expressions.value : content;
}"""
IS_READY = """() => {
  const panel = window.jupyterapp?.shell.currentWidget, context = panel?.sessionContext;
  return !!context && context.isReady && context.session?.kernel?.connectionStatus === 'connected'
    && context.session.kernel.status === 'idle';
}"""


class Lab:
    """Notebook 10, open in a browser."""

    def __init__(self, page):
        self.page = page

    def python(self, code, expression="None"):
        """Run ``code`` in the notebook's kernel; the value of ``expression`` then."""
        reply = self.page.evaluate(RUN_IN_KERNEL, ["import json\n" + code, f"json.dumps({expression})"])
        assert reply["status"] == "ok", reply
        return json.loads(ast.literal_eval(reply["data"]["text/plain"]))

    def value(self, expression):
        return self.python("", expression)

    def until(self, expression, seconds=30):
        """Wait until ``expression`` is true in the kernel."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.page.locator(".companion-lab").inner_text())
            time.sleep(0.1)

    def run_all(self):
        # Not awaited: the command ends with the last cell.
        self.page.evaluate(
            "() => { jupyterapp.shell.activateById(panel.id); jupyterapp.commands.execute('notebook:run-all-cells') }"
        )

    def show(self):
        """Scroll to the lab: JupyterLab hides the cells that are far from the window."""
        self.page.evaluate("panel.content.scrollToItem(5, 'start')")
        self.page.locator(".companion-lab").scroll_into_view_if_needed()

    def press(self, name):
        self.show()
        self.page.locator(".companion-lab button:not([disabled])", has_text=re.compile(f"{name}$")).click()

    def slider(self, name):
        """The handle of the slider that is labelled so, once it is enabled: a disabled one swallows keys."""
        self.show()
        label = self.page.locator(".widget-label", has_text=re.compile(f"^{name}$"))
        slider = self.page.locator(".companion-lab .widget-hslider", has=label)
        return slider.locator(".noUi-target:not([disabled]) .noUi-handle")

    def drag(self, name, share):
        """Drag a slider's handle to ``share`` of its track."""
        handle, track = (
            self.slider(name),
            self.slider(name).locator("xpath=ancestor::*[contains(@class,'noUi-base')]"),
        )
        start, box = handle.bounding_box(), track.bounding_box()
        self.page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + share * box["width"], start["y"] + start["height"] / 2, steps=10)
        self.page.mouse.up()

    def settle(self):
        self.until("lab.session.idle and not lab.session.playing")

    def start_afresh(self, batch_size=64):
        """Reset, with nothing playing or pinned, at ``batch_size``."""
        self.python(
            f"lab.session.pause(); lab.pin.value = False; lab.batch_size.value = {batch_size}; lab.reset.click()"
        )
        self.settle()
        assert self.value("lab.session.runs[0].training.steps") == 0

    def outputs(self):
        """Everything that cells show, as JSON."""
        return json.dumps(self.page.evaluate("panel.content.model.toJSON().cells.map(c => c.outputs)"))


def copy_notebook(folder):
    """Notebook 10 with a short rehearsal, on the real MNIST where it is."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    real = (Path(os.environ.get("COMPANION_DATA", "")) / "MNIST/raw/train-images-idx3-ubyte").exists()
    cell.source += "\nmove_at, end_at, large_batch_size = 3000, 6000, 256"
    cell.source += "\ndataset = 'mnist'" if real else "\ndataset, num_train = 'digits', 1297"
    folder.mkdir()
    nbformat.write(notebook, folder / "10_live_lab.ipynb")
    return folder / "10_live_lab.ipynb"


@contextlib.contextmanager
def serving(home, module, *options, ready="/"):
    """A server of its own, on a free port of loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
               "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}  # fmt: skip
    command = [sys.executable, "-m", module, "--no-browser", f"--port={port}", *options]
    log, address = home / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=os.environ | folders, stdout=stream, stderr=stream)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}{ready}", timeout=60)
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A JupyterLab of its own: (address, token)."""
    home, token = tmp_path_factory.mktemp("jupyter"), secrets.token_hex(16)
    root = copy_notebook(home / "root").parent
    no_news = home / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    no_news.parent.mkdir(parents=True)  # JupyterLab's question whether to fetch news would lie over the page
    no_news.write_text('{"fetchNews": "false"}')
    options = ["--ip=127.0.0.1", "--allow-root", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={root}", "--expose-app-in-browser"]  # fmt: skip
    with serving(home, "jupyterlab", *options, ready=f"/api?token={token}") as address:
        yield address, token


@pytest.fixture(scope="module")
def lab(server, browser):
    """The notebook run once, its rehearsal over; what the page logged and asked for is looked at in the end."""
    address, token = server
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    problems, requests = [], []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.on("websocket", lambda w: requests.append(w.url))
    page.goto(f"{address}/lab/tree/10_live_lab.ipynb?token={token}")
    page.wait_for_function(IS_READY, timeout=60_000)
    page.evaluate("() => { window.panel = jupyterapp.shell.currentWidget }")
    lab = Lab(page)
    lab.run_all()
    page.locator(".companion-chart").wait_for(timeout=60_000)
    lab.problems, lab.requests, lab.address = problems, requests, address
    return lab


def test_it_plays_by_itself_and_moves_the_slider(lab):
    lab.until("lab.session.runs[0].training.examples_seen >= 6000")
    lab.settle()
    assert lab.value("[(m.name, m.value) for m in lab.session.runs[0].moves]") == [["batch_size", 256]]
    assert lab.value("lab.batch_size.value") == 256
    assert lab.page.locator(".companion-mark").count() >= 2
    lab.page.wait_for_timeout(3000)  # the kept figure and texts are made anew once it pauses
    assert "Batch 8 \u2192 256: from step to step" in lab.outputs().encode().decode("unicode_escape")
    assert "image/png" in lab.outputs()


def test_a_dragged_slider_acts_within_the_step_and_leaves_a_mark(lab):
    lab.start_afresh()
    lab.press("Play")
    lab.until("lab.session.runs[0].training.steps > 20")
    before = lab.page.locator(".companion-curve[data-run='this run']").first.get_attribute("points")
    lab.drag("batch size", 0.25)
    lab.until("[m.value for m in lab.session.runs[0].moves[-1:]] == [lab.batch_size.value]")
    assert lab.value("lab.batch_size.value") < 64
    moves = lab.value("[vars(m) for m in lab.session.runs[0].moves if m.steps]")
    assert moves and all(0 <= m["steps"] - m["asked_steps"] <= 1 for m in moves)
    assert lab.value("lab.session.runs[0].training.batch_size") == moves[-1]["value"]
    lab.page.locator(".companion-status", has_text=f"Batch size {moves[-1]['value']}").wait_for()
    lab.until(f"lab.session.runs[0].training.steps > {moves[-1]['steps']} + 20")
    lab.page.wait_for_timeout(500)
    assert lab.page.locator(".companion-curve[data-run='this run']").first.get_attribute("points") != before
    assert lab.page.locator("svg[aria-label^='Loss'] .companion-mark").count() == len(moves)
    sizes = lab.value("lab.history.query(\"run == 'this run'\").minibatch_size.dropna().astype(int).tolist()")
    short = lab.value("lab.session.dataset.num_train") % 64  # the last minibatch of an epoch
    assert set(sizes[: moves[0]["steps"]]) <= {64, short} and sizes[moves[-1]["steps"]] == moves[-1]["value"]


def test_the_keyboard_moves_it_too(lab):
    lab.start_afresh()
    handle = lab.slider("batch size")
    handle.focus()
    for key, value in [("ArrowRight", 128), ("ArrowLeft", 64), ("ArrowLeft", 32), ("Home", 1)]:
        handle.press(key)
        lab.until(f"lab.session.runs[0].training.batch_size == {value}")
    handle.press("End")
    lab.until("lab.session.runs[0].training.batch_size == lab.session.dataset.num_train")


def test_step_takes_one_step_and_pause_stops_them(lab):
    lab.start_afresh()
    lab.press("Step")
    lab.until("lab.session.runs[0].training.steps == 1")
    lab.press("Play")
    lab.until("lab.session.runs[0].training.steps > 20")
    lab.press("Pause")
    lab.settle()
    steps = lab.value("lab.session.runs[0].training.steps")
    lab.page.wait_for_timeout(1000)
    assert lab.value("lab.session.runs[0].training.steps") == steps
    lab.page.locator(f".companion-chart[data-steps='{steps}']").wait_for()
    lab.page.locator(".companion-status", has_text="Paused").wait_for()


def test_reset_repeats_the_losses_to_the_bit_and_keeps_a_ghost(lab):
    losses = "lab.history.query(\"run == 'this run'\").minibatch_loss.dropna().tolist()[:10]"
    lab.start_afresh()
    for _ in range(10):
        lab.press("Step")
    lab.until("lab.session.runs[0].training.steps == 10")
    lab.settle()
    first = lab.value(losses)
    lab.press("Reset")
    lab.until("lab.session.runs[0].training.steps == 0")
    lab.page.locator(".companion-curve[data-run='previous']").first.wait_for()
    lab.press("Play")
    lab.until("lab.session.runs[0].training.steps > 20")
    lab.press("Pause")
    lab.settle()
    assert lab.value(losses) == first and len(first) == 10


def test_a_pinned_run_is_fed_the_same_examples(lab):
    lab.start_afresh()
    lab.press("Pin a second run")
    lab.slider("pinned batch").focus()
    lab.slider("pinned batch").press("ArrowRight")
    lab.until("len(lab.session.runs) == 2 and lab.session.runs[1].training.batch_size != 64")
    lab.press("Play")
    lab.until("lab.session.runs[0].training.steps > 40")
    lab.press("Pause")
    lab.settle()
    one, two = lab.value("[[r.training.examples_seen, r.training.batch_size] for r in lab.session.runs]")
    assert abs(one[0] - two[0]) < max(one[1], two[1])
    lab.page.locator(".companion-curve[data-run='pinned']").first.wait_for()


def test_an_exception_in_the_thread_is_shown_in_red_and_reset_recovers(lab):
    lab.start_afresh()
    lab.python("lab.session.runs[0].training.step = lambda: [][0]")
    lab.press("Play")
    error = lab.page.locator(".companion-error")
    error.wait_for()
    assert "IndexError: list index out of range" in error.inner_text()
    red, green, blue = map(int, re.findall(r"\d+", error.evaluate("e => getComputedStyle(e).color"))[:3])
    assert red > green + 60 and red > blue + 60
    lab.press("Reset")
    error.wait_for(state="detached")
    lab.press("Play")
    lab.until("lab.session.runs[0].training.steps > 5")


def test_export_has_the_figure_the_history_and_the_code(lab):
    lab.start_afresh()
    lab.press("Step")
    lab.until("lab.session.runs[0].training.steps == 1")
    lab.press("Export")
    panel = lab.page.locator(".companion-export")
    panel.wait_for()
    assert "training.advance(steps=1, record=False)" in panel.inner_text()
    for link, name in [("figure", "live_lab.png"), ("history", "live_lab.csv")]:
        with lab.page.expect_download() as download:
            panel.get_by_role("link", name=link).click()
        assert download.value.suggested_filename == name and download.value.path().stat().st_size > 100


def test_it_follows_the_theme_and_fits_a_narrow_window(lab):
    text = lab.page.locator(".companion-chart text").first
    shades = {}
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        lab.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        lab.page.wait_for_timeout(1500)
        shades[theme] = sum(map(float, re.findall(r"[\d.]+", text.evaluate("e => getComputedStyle(e).fill"))[:3]))
    assert shades["JupyterLab Dark"] > 500 and shades["JupyterLab Light"] < 250
    lab.page.set_viewport_size({"width": 700, "height": 1000})
    lab.page.wait_for_timeout(500)
    assert lab.page.locator(".companion-lab").evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    lab.page.set_viewport_size({"width": 1400, "height": 1000})


@pytest.mark.soak
def test_latency_and_draw_rate_are_printed(lab, capsys):
    """How fast it is, for the reader: no figure is asserted, machines differ."""
    lab.start_afresh()
    lab.press("Play")
    lab.until("lab.session.runs[0].training.steps > 20")
    handle = lab.slider("batch size")
    handle.focus()
    lab.page.evaluate("""() => {
      window.pressed = []; window.draws = 0;
      addEventListener('keydown', () => pressed.push((performance.timeOrigin + performance.now()) / 1000), true);
      const figure = document.querySelector('.companion-chart').parentElement;
      window.observer = new MutationObserver(() => draws++);
      observer.observe(figure, {childList: true});
    }""")
    began = time.monotonic()
    for i in range(40):
        handle.press("ArrowRight" if i % 2 else "ArrowLeft")  # between 64 and 32
        lab.page.locator(".companion-status", has_text=f"Batch size {64 if i % 2 else 32}").wait_for()
        lab.page.wait_for_timeout(50)
    draws = lab.page.evaluate("observer.disconnect(), draws") / (time.monotonic() - began)
    acted = lab.value("[m.acted_at for m in lab.session.runs[0].moves if m.steps]")
    pressed = lab.page.evaluate("pressed")
    assert len(acted) == len(pressed) == 40
    wait = 1000 * (np.array(acted) - pressed)
    lab.start_afresh()
    speeds = {6: [], 0.01: []}
    lab.press("Play")
    for _ in range(2):
        for rate in speeds:
            lab.python(
                f"from helpers.live import lab as live; live.DRAWS_PER_SECOND = {rate}; import time; time.sleep(0.5)"
            )
            a, b = lab.value(
                "[lab.session.runs[0].training.steps, (time.sleep(2), lab.session.runs[0].training.steps)[1]]"
            )
            speeds[rate].append((b - a) / 2)
    lab.python("live.DRAWS_PER_SECOND = 6")
    drawn, undrawn = (float(np.median(s)) for s in speeds.values())
    with capsys.disabled():
        print(
            f"\nslider to engine at batch 64 on {lab.value('lab.session.dataset.name')}: "
            f"median {np.median(wait):.0f} ms, 95th percentile {np.quantile(wait, 0.95):.0f} ms, "
            f"worst {wait.max():.0f} ms; {draws:.1f} draws/s; {drawn:.0f} steps/s, {undrawn:.0f} undrawn"
        )
    assert (wait > 0).all()


def test_running_the_cell_again_leaves_one_trainer_and_one_ticker(lab):
    lab.press("Play") if not lab.value("lab.session.playing") else None
    old = lab.value("id(lab)")
    names = "sorted(t.name for t in __import__('threading').enumerate() if t.name.startswith('companion'))"
    assert lab.value(names) == ["companion-ticker", "companion-trainer"]
    lab.run_all()
    lab.until(f"id(lab) != {old}", 60)
    lab.until("lab.session.builds > 0")
    assert lab.value(names) == ["companion-ticker", "companion-trainer"]
    lab.python("lab.close()")
    assert lab.value(names) == []


def test_the_page_logged_no_error_and_asked_loopback_only(lab):
    hosts = {
        re.sub(r"^(https?|wss?)://([^/]*).*", r"\2", u) for u in lab.requests if not u.startswith(("data:", "blob:"))
    }
    assert hosts == {lab.address.removeprefix("http://")}
    assert lab.problems == []


def test_voila_serves_it_as_an_app(browser, tmp_path):
    notebook = copy_notebook(tmp_path / "root")
    with serving(tmp_path, "voila", str(notebook), "--Voila.ip=127.0.0.1", ready="/voila/static/nope") as address:
        page = browser.new_page()
        page.goto(address, timeout=120_000)
        page.locator(".companion-status", has_text="Paused. Batch size 256").wait_for(timeout=60_000)
        label = page.locator(".widget-label", has_text=re.compile("^batch size$"))
        page.locator(".companion-lab .widget-hslider", has=label).locator(".noUi-handle").press("ArrowRight")
        page.locator(".companion-status", has_text="Batch size 512").wait_for()
        steps = page.locator(".companion-chart").get_attribute("data-steps")
        page.locator(".companion-lab button", has_text=re.compile("Play$")).click()
        page.locator(f".companion-chart:not([data-steps='{steps}'])").wait_for()
        assert page.get_by_text("lab.rehearse(").count() == 0  # the app shows no code
