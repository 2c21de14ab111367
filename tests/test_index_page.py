"""The index page in a real browser: it opens, shows figures and verdicts, and asks no host for anything."""

import pytest

from helpers import runs

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("browser") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_STORE", str(tmp_path_factory.mktemp("store")))
        assert runs.run("quick", only=["00", "01"], out=out) == 0
    return out


@pytest.mark.parametrize("width", [360, 1600])
def test_index_page_opens_whole_at_any_width(run_folder, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems, requests = [], []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto((run_folder / "index.html").as_uri())
    assert page.locator("h1").inner_text() == "What does the batch size do to training?"
    images = page.locator("figure img")
    assert images.count() == 6
    assert images.evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 300 && i.alt.length > 40)")
    assert page.locator("#verdicts ~ p").first.inner_text().startswith("0 claims reproduced")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    assert [u for u in requests if not u.startswith(("file:", "data:"))] == []


def test_an_executed_notebook_opens_from_the_index_without_any_request(run_folder, browser):
    page = browser.new_page()
    problems, requests = [], []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto((run_folder / "index.html").as_uri())
    page.get_by_role("link", name="01_toy_blobs: the executed notebook").click()
    page.wait_for_load_state()
    assert "Small batches are fast and noisy" in page.locator("h1").first.inner_text()
    assert page.locator("img").count() >= 4
    assert problems == []
    assert [u for u in requests if not u.startswith(("file:", "data:", "blob:"))] == []
