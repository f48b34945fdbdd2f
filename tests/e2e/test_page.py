"""The page in a browser: nothing but its own server is asked, and everyone can read and use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

from gitops_hook import Outcome, Reason
from tests.browser import SIZES, chromium, window
from tests.gallery import NOW, Gallery, on_show

MARKUP = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
LONG = "a-branch-with-a-very-long-name-and-no-blank-in-it-" * 8
SCHEMES = ("light", "dark")
# For each text that is shown: its colour, and the first opaque colour behind it.
TEXT_COLOURS = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility()) continue;
    let behind = element;
    let back = 'rgba(0, 0, 0, 0)';
    while (behind && back === 'rgba(0, 0, 0, 0)') {
      back = getComputedStyle(behind).backgroundColor;
      behind = behind.parentElement;
    }
    texts.push([text, getComputedStyle(element).color, back]);
  }
  return texts;
}"""
FOCUS = """() => {
  const element = document.activeElement;
  const style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  return {name: element.getAttribute('href') || element.tagName, outline: style.outlineStyle,
    width: parseFloat(style.outlineWidth), height: box.height,
    inside: box.top >= 0 && box.bottom <= innerHeight + box.height};
}"""

NAMES = "all => all.map(element => element.getAttribute('href') || element.tagName)"


@dataclass(frozen=True)
class Show:
    """Where the pages are, and which there are."""

    url: str
    paths: tuple[str, ...]
    gallery: Gallery


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as program:
        yield program


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    with on_show(tmp_path_factory.mktemp("page")) as (gallery, served):
        hostile = gallery.run("badbad00", 30, ref=f"refs/heads/{LONG}", title=MARKUP * 20)
        detail = f"{MARKUP} {'x' * 400}"
        gallery.job(hostile, "test", "failed", 25, 5)
        gallery.end(
            hostile,
            Outcome.FAILED,
            Reason.TESTS_FAILED,
            stage="test",
            ended=NOW - 10,
            detail=detail,
        )
        gallery.kubectl.logs[hostile.id] = {"pod.tests": f"{MARKUP}\n{'y' * 5000}\n"}
        runs = [seen.run.id for seen in gallery.context.observed_runs(gallery.states())]
        paths = ("/", "/apps/shop", "/apps/blog", *(f"/runs/{run}" for run in runs), "/runs/none")
        yield Show(served.url, paths, gallery)


@contextmanager
def still(browser: Browser, size: str = "desktop", scheme: str = "light") -> Iterator[Page]:
    """A window in which no page is loaded again by itself, which would disturb a slow test."""

    def fulfil(route: Route) -> None:
        answer = route.fetch()
        text = answer.text()
        calm = re.sub('<meta http-equiv="refresh" content="5">', "", text)
        route.fulfill(response=answer, body=calm)

    with window(browser, size, scheme) as page:
        page.route("**/*", fulfil)
        yield page


def luminance(colour: str) -> float:
    """The relative luminance of a colour, as WCAG defines it."""
    numbers = colour.removeprefix("rgba(").removeprefix("rgb(").rstrip(")").split(",")
    assert len(numbers) == 3 or float(numbers[3]) == 1.0, colour
    channels = [int(number) / 255 for number in numbers[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lights = sorted((luminance(one), luminance(other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def test_contrast_is_computed_as_the_guideline_defines_it() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21.0)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [*SIZES])
def test_no_page_has_an_error_or_asks_another_host(
    browser: Browser, show: Show, size: str, scheme: str
) -> None:
    complaints: list[str] = []
    asked: list[str] = []
    with still(browser, size, scheme) as page:
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        for path in show.paths:
            answer = page.goto(f"{show.url}{path}")
            assert answer
            assert answer.status == (404 if path == "/runs/none" else 200)
            assert page.title().endswith(" - gitops-hook")
    complaints = [text for text in complaints if "404" not in text]
    assert complaints == []
    # of each page the page alone, and the icon that a browser looks for by itself
    foreign = [url for url in asked if not url.startswith(f"{show.url}/")]
    assert foreign == []
    assert len([url for url in asked if not url.endswith("/favicon.ico")]) == len(show.paths)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [*SIZES])
def test_every_text_stands_out_from_what_is_behind_it(
    browser: Browser, show: Show, size: str, scheme: str
) -> None:
    backs = set[str]()
    with still(browser, size, scheme) as page:
        for path in show.paths:
            page.goto(f"{show.url}{path}")
            texts = page.evaluate(TEXT_COLOURS)
            assert len(texts) >= 5
            weak = {(text[:40], c, b) for text, c, b in texts if contrast(c, b) < 4.5}
            assert not weak
            backs |= {b for _, _, b in texts}
    assert len(backs) >= 5  # the states were among them


def test_the_two_schemes_are_different(browser: Browser, show: Show) -> None:
    colours = []
    for scheme in SCHEMES:
        with still(browser, "desktop", scheme) as page:
            page.goto(show.url)
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert luminance(colours[0]) > 0.9
    assert luminance(colours[1]) < 0.1


@pytest.mark.parametrize("size", [*SIZES])
def test_nothing_is_wider_than_the_window(browser: Browser, show: Show, size: str) -> None:
    with still(browser, size) as page:
        for path in show.paths:
            page.goto(f"{show.url}{path}")
            wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1], path
            cut = page.evaluate(
                "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth >"
                " e.clientWidth + 1 && e.clientWidth > 1 && getComputedStyle(e).overflowX"
                " !== 'visible').map(e => e.outerHTML.slice(0, 80))"
            )
            assert cut == [], path


def tab(page: Page) -> dict[str, Any]:
    """Press the tabulator; return what has the focus then."""
    page.keyboard.press("Tab")
    focus: dict[str, Any] = page.evaluate(FOCUS)
    return focus


@pytest.mark.parametrize("size", [*SIZES])
def test_the_keyboard_reaches_every_link_in_order_and_shows_where_it_is(
    browser: Browser, show: Show, size: str
) -> None:
    with still(browser, size) as page:
        for path in show.paths:
            page.goto(f"{show.url}{path}")
            wanted = page.eval_on_selector_all("a, pre", NAMES)
            assert wanted
            stops = [tab(page) for _ in wanted]
            assert [stop["name"] for stop in stops] == wanted
            assert not [s for s in stops if s["outline"] != "solid" or s["width"] < 2]
            assert all(stop["inside"] and stop["height"] for stop in stops)


def test_a_person_goes_from_the_first_page_to_a_log_and_back_with_keys(
    browser: Browser, show: Show
) -> None:
    with still(browser) as page:
        page.goto(show.url)
        page.get_by_role("link", name="shop-0d5c7e18").focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Run shop-0d5c7e18").wait_for()
        assert "KeyError: 'voucher'" in page.get_by_role("region", name="Log").inner_text()
        page.get_by_role("link", name="shop", exact=True).first.press("Enter")
        page.get_by_role("heading", name="shop", exact=True).wait_for()
        page.get_by_role("link", name="gitops-hook").press("Enter")
        page.get_by_role("heading", name="Apps and runs").wait_for()


def test_markup_from_outside_stays_text(browser: Browser, show: Show) -> None:
    with still(browser) as page:
        for path in show.paths:
            page.goto(f"{show.url}{path}")
            assert page.title() != "hacked"
            assert page.locator("script, img, iframe, object, form").count() == 0
        page.goto(show.url)
        assert MARKUP in page.inner_text("main")


@pytest.mark.parametrize("size", [*SIZES])
def test_who_listens_hears_tables_with_the_title_of_each_column(
    browser: Browser, show: Show, size: str
) -> None:
    with still(browser, size) as page:
        page.goto(show.url)
        assert page.get_attribute("html", "lang") == "en"
        assert page.get_by_role("heading", level=1).count() == 1
        tables = page.get_by_role("table")
        assert tables.count() == 2
        titles = tables.first.get_by_role("columnheader").all_text_contents()
        assert titles == ["App", "Environment", "Live version", "Since", "Rollback to", "Under way"]
        row = tables.first.get_by_role("row").nth(1)
        assert row.get_by_role("rowheader").inner_text().strip().endswith("shop")
        assert page.locator("th:not([scope])").count() == 0


def test_a_page_on_which_something_runs_is_loaded_again_by_itself(
    browser: Browser, show: Show
) -> None:
    with window(browser) as page:
        page.goto(show.url)
        with page.expect_navigation(timeout=30_000):
            pass
        assert page.get_by_role("heading", name="Apps and runs").count() == 1
