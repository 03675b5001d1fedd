"""The page in a browser, loaded once: numbers, filters, queries, tabs, dark mode, keyboard; no request, no error."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from reported import GALLERY, QUERIES

from relreid_plugin.report.lists import query_lists
from relreid_plugin.report.scored import read_subject

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page(reported_runs, tmp_path_factory):
    """The driver, with the report of the two runs opened."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its driver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    words = "headless no-sandbox disable-gpu no-first-run disable-background-networking window-size=1200,900".split()
    for word in [*words, f"user-data-dir={profile}"]:
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(f"{reported_runs[2].as_uri()}#view=1&cam=1&q=7")
        driver.linked = driver.execute_script(
            "return [[...document.querySelectorAll('[role=tab]')].map(one => one.getAttribute('aria-selected')),"
            " document.querySelector('#v1 .count').textContent, document.querySelector('#v1q7 .lists').hidden]"
        )
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def view(page):
    """The first run's tab, without filter and opened query."""
    page.execute_script("location.hash = ''; document.querySelectorAll('.filters').forEach(form => form.reset())")
    page.find_element("id", "tab-v0").click()
    wait(lambda: "12 of 12" in page.find_element("css selector", "#v0 .count").text)
    return page.find_element("id", "v0")


def wait(done):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(None, 10, poll_frequency=0.02).until(lambda _: done())


def texts(place, selector):
    return [one.text for one in place.find_elements("css selector", selector)]


def count_of(view):
    return view.find_element("css selector", ".count").text.split(" ")[0]


def select(view, name, text):
    view.find_element("name", name).send_keys(text)  # as a user types; the driver's own choice tells the page too little


def test_a_link_leads_to_its_filter_and_query(page):
    selected, count, hidden = page.linked
    assert selected == ["false", "true", "false"] and count.startswith("6 of 12 queries") and not hidden


def test_every_number_shown_is_that_of_the_metrics(page, view, reported_runs):
    for number, folder in enumerate(reported_runs[:2]):
        page.find_element("id", f"tab-v{number}").click()
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        script = (
            f"return [...document.querySelectorAll('#v{number} table.results tbody tr')].map(row =>"
            " [row.dataset.method, row.dataset.protocol, ...[...row.querySelectorAll('td[data-metric]')].map(cell =>"
            " [cell.dataset.metric, cell.innerText.trim().split(/[ \\u00a0]/)[0]])])"
        )
        shown = {(method, protocol): dict(cells) for method, protocol, *cells in page.execute_script(script)}
        assert set(shown) == {(row["method"], row["protocol"]) for row in rows}
        for row in rows:
            cells = shown[row["method"], row["protocol"]]
            wanted = {"mAP": row["mAP"], "mINP": row["mINP"], **row["cmc"]}
            assert {name: cells[name] for name in wanted} == {name: f"{100 * value:.1f}" for name, value in wanted.items()}


def test_filters_leave_what_they_name(page, view, reported_runs):
    target = next(iter(read_subject(reported_runs[0]).targets.values()))
    data, ap = target.data.query, target.scored[0].result.ap
    field = view.find_element("name", "cam")
    field.send_keys("1")
    assert count_of(view) == str((data.camids == 1).sum()) and "cam=1" in page.current_url
    assert {text for text in texts(view, ".head span:nth-of-type(2)")} == {"camera 1"}
    view.find_element("css selector", "button[type=reset]").click()
    wait(lambda: count_of(view) == str(QUERIES))
    view.find_element("name", "high").send_keys("50")
    assert count_of(view) == str((ap <= 0.5).sum())
    view.find_element("css selector", "button[type=reset]").click()
    wait(lambda: count_of(view) == str(QUERIES))
    select(view, "only", "won")
    after = int(view.find_element("name", "after").get_attribute("value"))
    gains = target.scored[after].result.ap - ap
    assert after
    wait(lambda: count_of(view) == str((gains > 1e-6).sum()))


def test_a_query_opens_with_its_lists(page, view, reported_runs):
    lists = query_lists(next(iter(read_subject(reported_runs[0]).targets.values())), 10)
    worst = lists["order"][0]
    head = view.find_element("css selector", ".head")
    assert head.get_attribute("aria-expanded") == "false"
    head.click()
    assert head.get_attribute("aria-expanded") == "true" and f"q={worst}" in page.current_url
    titles = texts(view, f"#v0q{worst} h4")
    assert len(titles) == 2 and titles[0].startswith(f"image model (inductive): AP {100 * lists['ap'][0][worst]:.1f}")
    script = (
        "return [...arguments[0].querySelectorAll('h4 + .strip')].map(one => [...one.children].map(item => item.className))"
    )
    kinds = page.execute_script(script, page.find_element("id", f"v0q{worst}"))
    after = int(view.find_element("name", "after").get_attribute("value"))
    for shown, way in zip(kinds, (0, after)):
        there = [state for item, state in zip(lists["index"][way][worst], lists["state"][way][worst]) if item >= 0]
        assert shown == [f"item {['miss', 'hit', 'junk'][state]}" for state in there]
    view.find_element("css selector", ".item.hit, .item.miss").click()
    dialog = page.find_element("id", "enlarged")
    assert dialog.is_displayed() and "identity" in dialog.find_element("css selector", "p").text
    dialog.find_element("css selector", "button").click()
    assert not dialog.is_displayed()


def test_runs_are_switched_by_mouse_and_keyboard(page, view):
    from selenium.webdriver.common.keys import Keys

    def shown():
        return [page.find_element("id", name).is_displayed() for name in ("v0", "v1", "p0")]

    page.find_element("id", "tab-v1").click()
    assert shown() == [False, True, False] and "view=1" in page.current_url
    for key, wanted in ((Keys.ARROW_RIGHT, 2), (Keys.ARROW_RIGHT, 0), (Keys.END, 2), (Keys.HOME, 0), (Keys.ARROW_LEFT, 2)):
        page.switch_to.active_element.send_keys(key)
        assert shown() == [number == wanted for number in range(3)]
        assert page.switch_to.active_element.get_attribute("aria-selected") == "true"


def test_a_query_is_opened_and_closed_by_the_keyboard(page, view):
    from selenium.webdriver.common.keys import Keys

    head = view.find_element("css selector", ".head")
    page.execute_script("arguments[0].focus()", head)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-expanded") == "true"
    head.send_keys(Keys.TAB)
    assert "item" in page.switch_to.active_element.get_attribute("class")
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.find_element("id", "enlarged").is_displayed()
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(lambda: not page.find_element("id", "enlarged").is_displayed())
    head.send_keys(Keys.SPACE)
    assert head.get_attribute("aria-expanded") == "false"


def test_the_map_shows_its_pictures(page, view):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    figure = view.find_element("css selector", ".map")
    plane, told = figure.find_element("css selector", "svg"), figure.find_element("css selector", ".told")
    points = len(plane.find_elements("css selector", "circle, path"))
    assert told.text == "6 identities" and points == QUERIES + GALLERY
    page.execute_script("arguments[0].focus()", plane)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert told.text.startswith("query: identity ") and len(figure.find_elements("css selector", ".chosen")) == 1
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert told.text.startswith("gallery: identity ")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plane)
    ActionChains(page).move_to_element(plane.find_element("css selector", "path:last-of-type")).perform()
    assert told.text.startswith("query: identity ")


def test_dark_and_light(page, view):
    def ground():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    button = page.find_element("id", "theme")
    before, pressed = ground(), button.get_attribute("aria-pressed")
    button.click()
    assert {before, ground()} == {"rgb(255, 255, 255)", "rgb(20, 24, 30)"} and button.get_attribute(
        "aria-pressed"
    ) != pressed
    button.click()
    assert ground() == before


def test_won_and_lost_queries_are_shown_before_and_after(page, view):
    page.find_element("id", "tab-p0").click()
    pair = page.find_element("id", "p0")
    select(pair, "only", "lost")
    wait(lambda: count_of(pair) != str(QUERIES))
    changes = texts(pair, ".head .lost")
    assert changes and len(changes) == int(count_of(pair)) and not texts(pair, ".head .won")
    pair.find_element("css selector", ".head").click()
    first, second = texts(pair, ".queries h4")
    assert first.startswith("first: ") and second.startswith("second: ")


@pytest.fixture(scope="module")
def looking(looking_runs, vehicle_run, tmp_path_factory):
    """A report of a RIB run and of a run of three modalities."""
    from relreid_plugin.cli.main import main

    out = tmp_path_factory.mktemp("looking") / "looking.html"
    assert main(["report", str(looking_runs[1]), str(vehicle_run), "--measure", "--overlays", "4", "--out", str(out)]) == 0
    return out


def test_networks_are_looked_into_and_modalities_shown(page, looking, looking_runs):
    page.get(looking.as_uri())
    if importlib.util.find_spec("pytorch_grad_cam"):
        pairs = page.find_elements("css selector", "#v0 .overlays .pair")
        assert len(pairs) == 4
        sizes = "return [...document.querySelectorAll('#v0 .overlays img')].map(one => one.naturalWidth)"
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", pairs[0])  # pictures load when they are near
        wait(lambda: len(page.execute_script(sizes)) == 8 and all(page.execute_script(sizes)))
        pairs[1].find_elements("css selector", "button")[1].click()
        assert "Grad-CAM" in page.find_element("css selector", "#enlarged p").text
        page.find_element("css selector", "#enlarged button").click()
        page.find_element("css selector", "#v0 .head").click()
        assert "Grad-CAM" in texts(page, "#v0 .lists .own span")
    (kept,) = [json.loads(path.read_text()) for path in (looking_runs[1] / "occlusion").iterdir()]
    cells = texts(page, "#v0 table[data-table^='Queries covered'] td")
    assert cells == [f"{100 * value:.1f}" for pair in zip(kept["mAP"], kept["rank1"]) for value in pair]
    page.find_element("id", "tab-v1").click()
    page.find_element("css selector", "#v1 .head").click()
    page.find_element("css selector", "#v1 .item.hit, #v1 .item.miss").click()
    parts = page.find_elements("css selector", "#enlarged img.part")
    assert texts(page, "#enlarged figcaption") == ["R", "N", "T"]
    wait(lambda: all(abs(part.size["width"] / part.size["height"] - 2) < 0.05 for part in parts))
    places = [part.value_of_css_property("object-position") for part in parts]
    assert places == ["50% 0%", "50% 50%", "50% 100%"]
    page.find_element("css selector", "#enlarged button").click()
    shown = page.find_element("css selector", "#v1 .lists").find_elements("css selector", "h4")
    assert len(shown) == 2 and "average query expansion" in shown[1].text  # not a test with modalities missing


def test_no_request_leaves_the_pages_and_nothing_fails(page, reported_runs, looking):
    """The last test of the pages: whatever was done above asked for nothing and logged nothing."""
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    outside = {url.split("#")[0] for url in asked if not url.startswith(("data:", "chrome"))}  # chrome: the empty first tab
    assert outside == {reported_runs[2].as_uri(), looking.as_uri()}
