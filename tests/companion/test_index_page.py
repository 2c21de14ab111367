"""The report in a real browser: it opens whole, filters, prints, is read by keyboard and aloud, and asks no host."""

import re

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def opened(run_folder, browser):
    """Opens the page with options of its own, notes what goes wrong and what is asked for; checks both at the end."""
    problems, requests, contexts = [], [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto((run_folder / "index.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert [u for u in requests if not u.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_it_opens_whole_at_any_width(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.locator("h1").first.inner_text() == "What does the batch size do to training?"
    images = page.locator("img")
    assert images.count() >= 20
    assert images.evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 300)")
    assert page.locator(".answer li").count() == 5  # the sixth is of notebook 03
    assert page.locator("#counts").inner_text().startswith("0 claims reproduced")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    assert dark == (scheme == "dark")


def test_the_answer_is_on_the_first_screen(opened):
    page = opened(viewport={"width": 1600, "height": 1000})
    for item in (*page.locator(".answer li").all(), *page.locator("section figure img").all()[:2]):
        box = item.bounding_box()
        assert box["y"] + box["height"] <= 1000


def test_it_filters_by_verdict_and_by_notebook_with_the_keyboard_alone(opened):
    page = opened(viewport={"width": 1200, "height": 900})

    def shown():
        return page.locator("tbody.claim").evaluate_all("all => all.filter(t => t.offsetHeight).map(t => t.id)")

    def count():
        return page.locator(".shown").evaluate("e => getComputedStyle(e, '::after').content")

    every = shown()
    assert len(every) == page.locator("tbody.claim").count() == 7
    page.locator("#show-02").focus()
    page.keyboard.press("Space")
    assert shown() == [c for c in every if page.locator(f"#{c}").get_attribute("class").endswith("of-05")]
    assert 0 < len(shown()) < len(every)
    page.keyboard.press("Space")
    page.locator("#show-inconclusive").focus()
    page.keyboard.press("Space")
    assert shown() == [c for c in every if "is-inconclusive" not in page.locator(f"#{c}").get_attribute("class")]
    assert "counter(shown)" in count()


def test_from_a_sentence_to_the_cell_behind_it_are_two_clicks(opened):
    page = opened(viewport={"width": 1200, "height": 900})
    page.locator(".answer li").first.get_by_role("link").first.click()
    claim = page.url.partition("#")[2]
    assert claim == "sweep-accuracy"
    page.locator(f"#{claim}").get_by_role("link", name="the cell that judges it").click()
    cell = page.locator("[id='" + page.url.partition("#")[2] + "']")
    cell.locator("summary").focus()
    page.keyboard.press("Enter")
    assert f'"{claim}"' in cell.inner_text()
    assert cell.evaluate("e => e.getBoundingClientRect().top") < 900


def test_it_can_be_read_aloud(opened):
    page = opened()
    without = page.locator("img").evaluate_all("all => all.filter(i => i.alt.length < 20).length")
    assert without == 0
    levels = page.locator("main :is(h2, h3)").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert levels[0] == 2 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("main").count() == 1
    labels = page.locator("input").evaluate_all("all => all.map(i => i.labels.length)")
    assert labels and set(labels) == {1}
    assert page.locator(".scroll:not([aria-label])").count() == 0


def test_it_prints_all_of_it_on_paper(opened, tmp_path):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("fieldset").first.is_visible() and page.locator("tbody.claim").last.is_visible()
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 8


def test_an_executed_notebook_opens_from_the_report(opened):
    page = opened()
    page.locator("[id='05_batch_size_switching']").get_by_role("link", name="by itself").click()
    page.wait_for_load_state()
    assert page.title() == "05_batch_size_switching"
    assert page.locator("img").count() >= 4
