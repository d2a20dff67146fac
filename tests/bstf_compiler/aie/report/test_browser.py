"""The report page in Chromium, as a user has it: from a file, with mouse and keyboard, wide and narrow."""

import base64
import io
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.report import Panel, gammas_of, write_report
from tests.bstf_compiler.aie.estimates import many
from tests.bstf_compiler.aie.report import pages

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromium-driver (apt-get install)")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return pages.write(tmp_path_factory.mktemp("report") / "report.html")


class Opened:
    """A page in the browser."""

    def __init__(self, chromium, path, width=1280, scheme="light"):
        self.browser = chromium
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # no scrolling under the mouse
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.get(path.as_uri())
        self.wait(lambda: self.text("#range") != "")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition):
        WebDriverWait(self.browser, 20, 0.05).until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        (found,) = self.all(selector)
        return found

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def range(self):
        """What the time axis shows, after the drawing that is under way."""
        self.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self.text("#range").split(" of ")[0]

    def picture(self, selector):
        """The pixels of a canvas, (h, w, 3), from 0 to 1."""
        self.range()
        address = self.run("return document.querySelector(arguments[0]).toDataURL()", selector)
        return imread(io.BytesIO(base64.b64decode(address.split(",")[1])))[..., :3]

    def column(self, heading):
        """The shown cells of a column of the table of layers, in order."""
        head = [cell.text.strip() for cell in self.all("#table thead th")]
        cells = f"#table tbody tr:not([hidden]) > :nth-child({head.index(heading) + 1})"
        return self.run("return [...document.querySelectorAll(arguments[0])].map(c => c.textContent)", cells)

    def overflows(self):
        """Whether the page as a whole is wider than its window."""
        return self.run("const page = document.documentElement; return page.scrollWidth > page.clientWidth")

    def errors(self):
        return [entry for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture
def page(chromium, written):
    return Opened(chromium, written)


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_loads_without_errors_network_or_overflow(chromium, written, width, scheme):
    page = Opened(chromium, written, width, scheme)
    assert page.errors() == []
    assert page.run("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert not page.overflows()
    wide = page.run(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, nav, .skip, .unseen, svg')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    for selector in ("canvas.lanes", "canvas.memory"):
        drawn = page.picture(selector)
        assert drawn.shape[1] > 0.8 * (width - 60) and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 5
    assert page.run("return document.querySelectorAll('#roofline .dot').length") == sum(
        len(panel["roofline"]) for panel in pages.data_of(written)["panels"]
    )


CONTRAST = """
const parse = c => c.match(/[\\d.]+/g).map(Number);
const light = c => parse(c).slice(0, 3).map(v => v / 255)
  .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor, p = parse(c);
    if (c.startsWith('rgb') && (p.length === 3 || p[3] === 1)) return c;
  }
};
return [...document.querySelectorAll('h1, h2, h3, p, dt, dd, th, td, li, a, button, figcaption span, summary, output')]
  .filter(e => e.textContent.trim() && e.offsetWidth && !e.closest('.verdict, tr.chosen, .skip, :disabled'))
  .map(e => [e.outerHTML.slice(0, 60), [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a)])
  .map(([what, [a, b]]) => [what, (a + .05) / (b + .05)]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_background(chromium, written, scheme):
    """By the contrast of WCAG 2.1, level AA: 4.5 for text of any size."""
    page = Opened(chromium, written, scheme=scheme)
    found = page.run(CONTRAST)
    assert len(found) > 100
    assert [one for one in found if one[1] < 4.5] == []
    dark = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")


def test_everything_that_takes_keys_has_a_name(page):
    """As Chromium tells a screen reader."""
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if not node["ignored"]:
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "link", "searchbox", "checkbox", "radio", "application", "columnheader", "rowheader"):
        assert named[role] and all(named[role]), role
    assert any("Timeline of dense" in name for name in named["application"])
    pictures = [name for role in ("image", "img") for name in named.get(role, [])]
    assert sum(name.startswith("Γ of conv") for name in pictures) >= 3 and all(pictures)
    assert len(named["heading"]) > 8 and named["navigation"] == ["Sections"]


def test_tab_goes_through_the_page_in_order(page):
    """From top to bottom, and every stop can be seen to be one."""
    seen, tops = [], []
    for _ in range(40):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        tag, top, outline, words = page.run(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.tagName, e.getBoundingClientRect().top + scrollY, s.outlineStyle, e.textContent.trim()]"
        )
        assert outline != "none" and tag != "BODY"
        seen.append((tag, words))
        tops.append(top)
    assert seen[0] == ("A", "To the content")
    assert ("BUTTON", "Zoom in") in seen and ("SUMMARY", "Memory map as a table") in seen
    below = [top for (tag, _), top in zip(seen, tops) if tag in ("BUTTON", "CANVAS", "SUMMARY")]
    assert all(a <= b + 40 for a, b in pairwise(below))


def test_table_sorts_both_ways(page):
    sparse = pages.compiled()[1][1].estimate.layers
    in_order = [layer.name for layer in sparse]
    assert page.column("layer") == in_order
    heads = {head.text.strip(): head for head in page.all("#table thead th")}
    assert {head.get_attribute("aria-sort") for head in heads.values()} == {"none"}
    button = heads["time, µs"].find_element(By.TAG_NAME, "button")
    page.run("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    by_time = sorted(sparse, key=lambda layer: -layer.seconds)
    assert page.column("layer") == [layer.name for layer in by_time] != in_order
    assert heads["time, µs"].get_attribute("aria-sort") == "descending"
    assert page.text("#status") == "Sorted by time, µs, descending."
    button.send_keys(Keys.ENTER)
    assert page.column("layer") == [layer.name for layer in reversed(by_time)]
    assert heads["time, µs"].get_attribute("aria-sort") == "ascending"
    page.run("arguments[0].click()", heads["#"].find_element(By.TAG_NAME, "button"))
    assert page.column("layer") == in_order
    assert heads["time, µs"].get_attribute("aria-sort") == "none"


def test_table_is_searched(page):
    sparse = pages.compiled()[1][1].estimate.layers
    assert page.text("#found") == f"{len(sparse)} of {len(sparse)} layers"
    page.one("#search").send_keys("MAXPOOL")
    pools = [layer.name for layer in sparse if layer.op == "maxpool"]
    assert page.column("layer") == pools and page.text("#found") == f"1 of {len(sparse)} layers"
    page.one("#search").clear()
    page.one("#search").send_keys("nothing such")
    assert page.column("layer") == [] and page.text("#found") == f"0 of {len(sparse)} layers"


def test_all_columns_are_shown_on_demand(page):
    shown = [cell.text.strip() for cell in page.all("#table thead th") if cell.is_displayed()]
    assert "bytes" not in shown and "why not less" in shown
    page.one("#more").click()
    shown = [cell.text.strip() for cell in page.all("#table thead th") if cell.is_displayed()]
    assert "bytes" in shown and "LOADFM, µs" in shown


def duration(seconds):
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3f} µs"


def test_time_axis_zooms_and_pans_with_buttons_keys_and_mouse(page):
    whole = pages.compiled()[1][0].estimate.total_seconds
    assert page.range() == duration(whole) and not page.one("#fit").is_enabled()
    before = [page.picture("canvas.lanes"), page.picture("section.sparse canvas.memory")]
    page.one("#in").click()
    assert page.range() == duration(whole / 2)
    after = [page.picture("canvas.lanes"), page.picture("section.sparse canvas.memory")]
    assert all((one != other).any() for one, other in zip(before, after))  # all drawings move together
    page.one("#later").click()
    assert page.range() == duration(whole / 2) and (page.picture("canvas.lanes") != after[0]).any()
    canvas = page.all("canvas.lanes")[0]
    page.run("arguments[0].focus()", canvas)
    canvas.send_keys("+")
    assert page.range() == duration(whole / 4)
    canvas.send_keys("-")
    canvas.send_keys(Keys.ARROW_LEFT)
    assert page.range() == duration(whole / 2)
    canvas.send_keys("0")
    assert page.range() == duration(whole) and (page.picture("canvas.lanes") == before[0]).all()
    wheel = "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -200, ctrlKey: true, cancelable: true}))"
    page.run(wheel, canvas)
    assert page.range() == duration(whole * np.exp(-1))
    ActionChains(page.browser).drag_and_drop_by_offset(canvas, -200, 0).perform()
    moved = page.picture("canvas.lanes")
    ActionChains(page.browser).drag_and_drop_by_offset(canvas, 200, 0).perform()
    assert page.range() == duration(whole * np.exp(-1)) and (page.picture("canvas.lanes") != moved).any()
    page.one("#fit").click()
    assert page.range() == duration(whole)
    scrolled = page.run("const e = new WheelEvent('wheel', {deltaY: 99, cancelable: true});"
                        "arguments[0].dispatchEvent(e); return e.defaultPrevented", canvas)  # fmt: skip
    assert not scrolled and page.range() == duration(whole)


def test_chosen_layer_is_shown_everywhere(page):
    """It fills all timelines, whatever else they show, and stands out in the table, the roofline and the pictures."""
    dense, sparse = (panel.estimate.layers for panel in pages.compiled()[1])
    layer = next(layer for layer in sparse if layer.op == "conv" and layer.start > 0)
    other = next(one for one in dense if one.name == layer.name)
    page.run("arguments[0].click()", page.one(f'#table button[data-layer="{layer.name}"]'))
    assert page.range() == duration(1.1 * max(layer.seconds, other.seconds))
    begin, takes = duration(layer.start), duration(layer.seconds)
    assert f"sparse: {layer.name} begins at {begin}, takes {takes}, bound by {layer.bound}." in page.text("#status")
    assert f"dense: {layer.name} begins at {duration(other.start)}, takes" in page.text("#status")
    assert page.run("return document.querySelector('#table tr.chosen th').textContent") == layer.name
    assert (
        page.run("return [...document.querySelectorAll('.dot.chosen')].map(e => e.dataset.layer)") == [layer.name] * 2
    )
    assert page.run("return document.querySelector('figure.chosen button').textContent") == layer.name
    page.one("#next").click()
    following = [one.name for one in sparse][[one.name for one in sparse].index(layer.name) + 1]
    assert page.text("#table tr.chosen th") == following


def test_hovering_tells_what_is_there(page):
    _, sparse = pages.compiled()[1]
    page.run(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", page.one("section.sparse canvas.lanes")
    )
    first = sparse.estimate.layers[0]

    def at(canvas, t, y):
        whole = pages.compiled()[1][0].estimate.total_seconds
        return page.run(
            "const c = arguments[0], x = 84 + arguments[1] * (c.clientWidth - 84), r = c.getBoundingClientRect();"
            "c.dispatchEvent(new PointerEvent('pointermove', {clientX: r.left + x, clientY: r.top + arguments[2]}));"
            "return document.getElementById('tip').textContent.split('\\n')",
            canvas, t / whole, y,
        )  # fmt: skip

    lanes, memory = page.one("section.sparse canvas.lanes"), page.one("section.sparse canvas.memory")
    assert at(lanes, first.seconds / 2, 10) == [first.name, duration(first.seconds), f"bound by {first.bound}"]
    computed = [span for span in sparse.estimate.spans if span.kind == "COMP" and span.layer == first.name]
    middle = (min(span.start for span in computed) + max(span.end for span in computed)) / 2
    told = at(lanes, middle, 20 + 5 + 4 * 25 + 10)  # the fifth lane
    assert told[0] == f"COMP {first.name}" and told[1] == "4 of 4 units"
    assert told[4] == f"0 bytes, {sum(span.macs for span in computed):,} multiply-adds"
    held = [one for one in sparse.estimate.held if one.first == 0 <= one.last and not one.address]
    told = at(memory, first.seconds / 2, 147)
    assert told[0].startswith(held[0].name) and told[1] == f"{held[0].bytes:,} bytes at address 0"


def test_units_are_unpacked_when_they_are_asked_for(page):
    """A row of 9 pixels for each unit, and 5 between lanes, in place of a lane of 25."""
    height = page.picture("canvas.lanes").shape[0]
    press(page, "true")
    units = [len({s.unit for s in pages.compiled()[1][0].estimate.spans if s.kind == kind}) for kind in KINDS]
    assert page.picture("canvas.lanes").shape[0] - height == sum(9 * n + 5 - 25 for n in units if n)
    press(page, "false")
    assert page.picture("canvas.lanes").shape[0] == height and page.errors() == []


def press(page, state):
    """Shows or hides the rows of units."""
    page.one("#units").click()
    page.wait(lambda: page.one("#units").get_attribute("aria-pressed") == state)


def test_pictures_show_the_blocks(page):
    """The middle of each square is dark exactly where the weights have a block."""
    graphs, (_, sparse) = pages.compiled()
    gammas = gammas_of(graphs[1], [layer.name for layer in sparse.estimate.layers])
    assert len(page.all("#gammas figure")) == len(gammas)
    for name, gamma in gammas.items():
        picture = page.picture(f'#gammas canvas[aria-label^="Γ of {name}:"]').mean(axis=-1)
        size = picture.shape[0] / gamma.shape[0]
        assert picture.shape == (gamma.shape[0] * size, gamma.shape[1] * size)
        rows, columns = (((np.arange(n) + 0.4) * size).astype(int) for n in gamma.shape)
        np.testing.assert_array_equal(picture[np.ix_(rows, columns)] < 0.5, gamma)


def test_roofline_changes_its_level(page):
    before = page.run("return document.querySelector('#roofline').innerHTML")
    page.all("input[name=level]")[1].click()
    after = page.run("return document.querySelector('#roofline').innerHTML")
    assert "byte of DDR" in before and "byte between memory tiles and cores" in after


def test_large_program_stays_responsive(chromium, tmp_path):
    """80,000 spans: opens, zooms and shows the units, without an error or a wait of more than seconds."""
    program = pages.compiled()[1][1].code
    code = SimpleNamespace(**{name: getattr(program, name) for name in ("name", "device", "packing", "weight_bytes")})
    write_report(tmp_path / "large.html", [Panel("", code, replace(many(80_000), cost_model="calibrated"))])
    page = Opened(chromium, tmp_path / "large.html", 400)
    assert page.run("return performance.getEntriesByType('navigation')[0].loadEventEnd") < 5000
    press(page, "true")
    for _ in range(5):
        page.one("#in").click()
        page.range()
    assert not page.overflows() and page.errors() == []
