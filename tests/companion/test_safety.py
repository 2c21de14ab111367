"""Nothing is unpickled or run that was only to be read, no name leads out of its folder, no page acts by itself."""

import ast
import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import matplotlib.figure
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner

import helpers
from companion import cli, grid, pages, parameters, run
from helpers import plots
from helpers.sweep import jobs
from helpers.sweep.store import Store

COMPANION = [sys.executable, "-c", "from companion.cli import main; main()"]
SOURCES = sorted(Path(helpers.__file__).parents[1].rglob("*.py"))

# What the code may not do

UNPICKLE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"}
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "joblib.load", "joblib.dump",
         "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
         "subprocess.getoutput", "subprocess.getstatusoutput", "torch.save"}  # fmt: skip


def forbidden(source):
    """What a source may not do, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            names = [f"{m}.{a.name}" for m in modules for a in node.names] if isinstance(node, ast.ImportFrom) else []
            found += [(node, m) for m in modules if m.split(".")[0] in UNPICKLE]
            found += [(node, n) for n in names if n in NEVER or n in ("numpy.load", "torch.load")]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        said = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
        if name in NEVER or name.endswith((".to_pickle", ".read_pickle")):
            found.append((node, name))
        if name in ("np.load", "numpy.load") and said.get("allow_pickle") is not False:
            found.append((node, name))
        if name == "torch.load" and said.get("weights_only") is not True:
            found.append((node, name))
        if name.startswith("subprocess."):
            words = isinstance(node.args[0], ast.List) if node.args else False
            if not words or said.get("shell", False) is not False or "shell" in given.keys() - said.keys():
                found.append((node, name))
    return [f"{node.lineno}: {what}" for node, what in found]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_no_source_unpickles_evaluates_or_asks_a_shell(file):
    found = forbidden(file.read_text(encoding="utf-8"))
    if file.stem in ("jobs", "sending", "memory"):  # objects go to workers through a pipe, or Dask's own channel
        found = [one for one in found if not one.endswith("pickle")]
    assert found == []


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import shelve, os", "eval('1')", "os.system('x')", "os.popen('x')",
    "np.load(f)", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=x)", "torch.load(f)", "joblib.load(f)",
    "torch.load(f, weights_only=False)", "from numpy import load", "yaml.load(t, Loader=x)", "pd.read_pickle(f)",
    "frame.to_pickle(f)", "subprocess.run(f'ls {x}')", "subprocess.run('ls %s' % x, shell=True)",
    "subprocess.run(['ls'], shell=True)", "subprocess.call(['ls'], shell=yes)", "subprocess.Popen(command)",
])  # fmt: skip
def test_what_no_source_may_do_is_noticed(line):
    assert forbidden(line)


def test_the_arguments_of_parallel_calls_are_not_pickled_to_disk():
    tree = ast.parse(Path(jobs.__file__).read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "joblib.parallel_config"]
    loky = [c for c in calls if any(isinstance(a, ast.Constant) and a.value == "loky" for a in c.args)]
    assert loky
    for call in loky:
        limit = {k.arg: k.value for k in call.keywords}.get("max_nbytes")
        assert isinstance(limit, ast.Constant) and limit.value is None


# Names and paths


def tree(folder):
    return {str(f): f.lstat().st_size for f in sorted(folder.rglob("*"))}


FRAME = pd.DataFrame({"test_loss": [0.25, 0.5]})
ARRAYS = {"step": np.array([7])}
KEY = "0123456789abcdef01234567"


@pytest.mark.parametrize(
    "key", ["../x", "/tmp/x", "a/b", "..", ".", "", "f" * 5000, "0" * 23 + "\0", "0" * 23 + "\n", KEY + "\n",
            KEY.upper(), f"../{KEY}"], ids=range(12),
)  # fmt: skip
def test_a_key_that_is_none_leads_nowhere(key, tmp_path, store_folder):
    store = Store()
    store.put({"of": 1}, FRAME)
    (tmp_path / "x").mkdir()
    before = tree(tmp_path)
    for call in (store.has, store.frame, store.arrays, store.claim):
        with pytest.raises(ValueError, match="is not a key"):
            call(key)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "names", [["../../secret"], ["/etc/passwd"], ["frame.parquet", "../../secret"], ["entry.json"]]
)
def test_an_entry_that_names_other_files_is_set_aside(names, tmp_path):
    (tmp_path / "secret").write_text("secret")
    store = Store()
    key = store.put({"of": 1}, FRAME)
    record = json.loads((store.folder / key / "entry.json").read_text())
    record["sha256"] = dict.fromkeys(names, record["sha256"]["frame.parquet"])
    (store.folder / key / "entry.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="names other files"):
        assert not store.has(key)
    assert (tmp_path / "secret").read_text() == "secret"


def test_the_folder_of_a_point_has_one_name_that_stays_inside(tmp_path):
    for value in [
        "../../x",
        "/etc",
        "..",
        "a\0b",
        "x" * 5000,
        "é" * 80,
        "-rf",
        "~",
        "",
        "a\nb",
        ["../x"],
        None,
        "\ud800",
    ]:
        for values in ({"model": value}, {"model": value, "lr": 0.1}, {"model": [value]}):
            name = grid._name(values)
            (tmp_path / name).mkdir(exist_ok=True)
            assert len(name) <= 100 and (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_an_output_that_is_no_new_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/figure.png").write_text("precious")
    before = tree(tmp_path)
    for out in ("/dev/null", tmp_path / "file", tmp_path / "file/below", tmp_path / ("x" * 300), tmp_path / "full"):
        for command in (["run", "--only", "00"], ["rerun", "00", "--grid", "lr=0.1"]):
            result = CliRunner().invoke(cli.main, [*command, "--profile", "quick", "--out", str(out)])
            assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and result.stdout == ""
    assert tree(tmp_path) == before


# Pages

SCRIPT = "<script>window.hacked=1</script>"
IMAGE = '"><img src=x onerror="window.hacked=1;alert(1)">'
LEADING = (
    '<img src="{}/img"><link rel="stylesheet" href="{}/link"><link rel="prefetch" href="{}/prefetch">'
    '<base href="{}/base/"><meta http-equiv="refresh" content="0;url={}/meta">'
    '<META/http-equiv=refresh content="0;url={}/other"><iframe src="{}/frame"></iframe>'
    '<iframe srcdoc="&lt;script&gt;parent.hacked=1&lt;/script&gt;&lt;img src={}/inner&gt;"></iframe>'
    '<object data="{}/object"></object><embed src="{}/embed"><video src="{}/video"></video>'
    '<svg onload="window.hacked=1"><image href="{}/svg"/></svg><p style="background:url({}/style)">p</p>'
    '<a href="javascript:window.hacked=1">link</a><form action="{}/form"><button id="send">send</button></form>'
)


CLICKED = """async () => {
    document.querySelectorAll('#send, [href^="javascript"]').forEach(one => one.click());
    await new Promise(done => setTimeout(done, 300));
    return window.hacked ?? null;
}"""


@pytest.fixture(scope="module")
def host():
    """A host to which nothing may go: its address, and the paths that it was asked for."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(scope="module")
def written(tmp_path_factory, host):
    """Runs of a notebook whose title, text, outputs, figure and parameter are markup that would act."""
    folder, bad = tmp_path_factory.mktemp("written"), SCRIPT + IMAGE + LEADING.replace("{}", host[0])
    (folder / "notebooks").mkdir()
    (folder / "notebooks/profiles.yml").write_text("quick: {}\nlaptop: {}\non_digits: {}\n")
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    new = nbformat.v4.new_notebook(metadata={"kernelspec": kernel, "companion": {"main_figure": "01_own"}})
    figure = (
        "import matplotlib.figure; from pathlib import Path; from helpers import plots\n"
        "figure = matplotlib.figure.Figure(); figure.subplots().set_title(text, loc='left')\n"
        "plots.save(figure, '01_own', output_dir, text); None"
    )
    shows = (
        "from IPython.display import HTML, SVG, Javascript, Markdown, display\n"
        f"bad = {bad!r} + text\n"
        "print(bad)\ndisplay(HTML(bad), Markdown(bad), Javascript('window.hacked=1'))\n"
        "display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"><script>window.hacked=1</script></svg>'))"
    )
    new.cells = [
        nbformat.v4.new_markdown_cell(f"# Title {SCRIPT}{IMAGE}\n\n{bad}"),
        nbformat.v4.new_code_cell('output_dir = "."\ntext = "none"', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(figure),
        nbformat.v4.new_code_cell(shows),
    ]
    nbformat.write(new, folder / "notebooks/01_own.ipynb")
    failing = nbformat.from_dict(new)
    failing.cells = [*new.cells[:2], nbformat.v4.new_code_cell(f"raise ValueError({bad!r})")]
    nbformat.write(failing, folder / "notebooks/02_fails.ipynb")
    notebooks = folder / "notebooks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_STORE", str(folder / "store"))
        given = {"text": SCRIPT + IMAGE}
        assert run.run("quick", "digits", given=given, folder=notebooks, out=folder / "run", say=str) == 1
        request = grid.Request("01_own", [{"text": [SCRIPT + IMAGE, bad]}], "quick", "digits", jobs=2)
        assert grid.rerun(request, out=folder / "rerun", folder=notebooks, say=str) == 0
    return folder


@pytest.fixture
def opened(browser, host):
    """A page that notes whatever it does by itself."""
    page, (_, asked) = browser.new_page(), host
    asked.clear()
    page.did = []
    page.on("dialog", lambda dialog: (page.did.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.did.append(str(error)))
    yield page
    page.close()


def settled(page, file):
    """The page, once it has had the time to do something."""
    page.goto(file.as_uri())
    page.wait_for_timeout(500)
    assert page.url == file.as_uri()
    return page


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("file", ["run/index.html", "run/01_own.html", "run/02_fails.html", "rerun/index.html"])
def test_markup_in_parameters_titles_and_outputs_neither_runs_nor_asks_for_anything(file, written, opened, host):
    page = settled(opened, written / file)
    policies = page.locator('meta[http-equiv="Content-Security-Policy"]')
    assert policies.count() == 1 and "default-src 'none'" in policies.get_attribute("content")
    assert "window.hacked" in page.locator("body").inner_text()  # it was there, as text
    assert (page.evaluate("window.hacked"), page.did, host[1]) == (None, [], [])
    # All clicks in one call: the page's driver would wait for a navigation that the policy has stopped.
    assert page.evaluate(CLICKED) is None
    assert (page.did, host[1], page.url) == ([], [], (written / file).as_uri())


@pytest.mark.browser
@pytest.mark.slow
def test_without_its_policy_the_sanitised_page_does_not_act_either(written, opened, host):
    text = (written / "run/01_own.html").read_text(encoding="utf-8")
    assert pages.POLICY in text
    bare = written / "bare.html"
    bare.write_text(text.replace(pages.POLICY, ""), encoding="utf-8")
    settled(opened, bare)
    assert (opened.evaluate(CLICKED), opened.did, host[1], opened.url) == (None, [], [], bare.as_uri())


@pytest.mark.browser
@pytest.mark.slow
def test_the_same_markup_acts_on_a_page_with_neither(written, opened, host):
    bare = written / "bare.html"
    bare.write_text(
        f"<p>{SCRIPT}{IMAGE}{LEADING.replace('{}', host[0])}".replace("<base", "<b").replace("refresh", "x")
    )
    settled(opened, bare)
    assert opened.evaluate("window.hacked") == 1 and opened.did
    assert {"/img", "/frame", "/svg", "/style"} <= set(host[1])


@pytest.mark.browser
@pytest.mark.slow
def test_the_pictures_of_every_page_load_under_its_policy(written, opened):
    for file, number in (("rerun/index.html", 2), ("run/index.html", 1)):
        page = settled(opened, written / file)
        shown = page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth > 100)")
        assert shown == [True] * number


# JupyterLab


@pytest.fixture
def lab(tmp_path):
    """JupyterLab as the command starts it, and the address it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}": str(tmp_path / name) for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")}
    environment = {**os.environ, **own}
    environment.pop("JUPYTER_TOKEN", None)
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*COMPANION, "lab", "--", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path,
            # As in a terminal: what a shell starts in the background ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (said := re.search(r"http://127\.0\.0\.1:\d+/\S*token=\w+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        while True:  # it says the address shortly before it listens
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield process, port, said[0]
    finally:
        process.kill()
        process.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_companion_lab_listens_on_this_machine_alone_behind_a_token_and_ends_on_ctrl_c(lab):
    process, port, said = lab
    assert f":{port}/lab/tree/notebooks/00_start_here.ipynb?token=" in said
    own = psutil.Process(process.pid)
    listening = []
    for one in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # what the lab asks once, and has ended meanwhile
            listening += [c.laddr for c in one.net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(a.ip, a.port) for a in listening if a.port == port] == [("127.0.0.1", port)]
    assert {a.ip for a in listening} <= {"127.0.0.1", "::1"}
    token = said.rsplit("=", 1)[1]
    assert len(token) >= 32
    contents = f"http://127.0.0.1:{port}/api/contents/notebooks/00_start_here.ipynb?content=0"
    assert answers(contents) == 403
    assert answers(f"{contents}&token=wrong") == 403
    assert answers(f"{contents}&token={token}") == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0


def test_make_lab_is_the_command():
    makefile = (parameters.PROJECT / "Makefile").read_text(encoding="utf-8")
    arguments = ["make", "-n", "--no-print-directory", "lab", "ARGS=--no-browser --port=8899"]
    own = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # not of a make that runs the tests
    shown = subprocess.run(arguments, cwd=parameters.PROJECT, text=True, capture_output=True, check=True, env=own)
    assert shown.stdout.strip().splitlines()[-1] == ".venv/bin/companion lab -- --no-browser --port=8899"
    assert "jupyter lab" not in makefile


def test_a_figure_is_saved_below_its_folder(tmp_path):
    plots.save(matplotlib.figure.Figure(), "01_x", tmp_path, "")
    assert sorted(f.name for f in tmp_path.rglob("*.*")) == ["01_x.png", "01_x.svg"]
