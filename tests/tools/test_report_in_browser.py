"""Reports in a real browser: a clean console, no network, nothing that sticks out, values under the pointer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crossdock.tools.report import FAULTS_FOLDER, RANK_LOAD_FILE, note_event, write_report
from crossdock.tools.report.heat import PALETTE, to_indices
from tests.browser import Browser, Page
from tests.tiny import by_hand
from tests.tools.runs import everything_of, long_run, metrics_of, write_loads, write_metrics

pytestmark = pytest.mark.browser

# Whatever reaches beyond the page's right edge without being scrolled or cut off by a box around it.
STICKS_OUT = """[...document.querySelectorAll("body *")].filter((element) => {
  if (element.closest(".scroll") || element.getBoundingClientRect().right <= innerWidth + 0.5) return false;
  return getComputedStyle(element).visibility !== "hidden" && !element.closest("svg svg:not(.mark)");
}).map((element) => element.outerHTML.slice(0, 200))"""
# Letters over letters: ticks of one axis, and titles beside them.
OVERLAPS = """[...document.querySelectorAll("figure")].flatMap((figure) => {
  const boxes = [...figure.querySelectorAll(".tick, h3, .legend")].map((element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return [element.textContent, range.getBoundingClientRect()];
  }).filter(([, box]) => box.width);
  return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4
  ).map(([two]) => `${figure.querySelector("h3").textContent}: ${one} over ${two}`));
})"""
KINDS = ["small", "large", "without loads", "with nulls", "one step", "ranks", "everything", "several"]
HOSTILE = "<img src=x onerror=document.title='run'>"


def _small(folder: Path) -> None:
    rows = [metrics_of(step, 60) for step in range(1, 61)]
    for row in rows[19::20]:
        row["validation_loss"] = row["loss"] + 0.2
    write_metrics(folder, rows)
    counts = np.random.default_rng(0).integers(10, 1000, size=(6, 3, 8))
    counts[:, 0, 1] = counts[:, 0].mean(axis=1) * 2
    counts[2, 1, 5] = 0
    counts[-2:, 2, 4] = 0
    write_loads(folder, counts)


def _large(folder: Path) -> None:
    write_metrics(folder, [metrics_of(step, 20_000, tflops=330.0, mfu=33.0) for step in range(1, 20_001)])
    counts = np.random.default_rng(0).lognormal(5, 0.6, size=(400, 48, 128))
    write_loads(folder, counts, interval=50)


def _without_loads(folder: Path) -> None:
    write_metrics(folder, [metrics_of(step, 5) for step in range(1, 6)])


def _with_nulls(folder: Path) -> None:
    bad = {"loss": None, "grad_norm": None}
    write_metrics(folder, [metrics_of(step, 40, **(bad if step % 7 == 0 else {})) for step in range(1, 41)])


def _one_step(folder: Path) -> None:
    write_metrics(folder, [metrics_of(1, 1)])
    write_loads(folder, np.array([[[3, 1, 0, 4]]]), interval=1)


def _ranks(folder: Path) -> None:
    """Loads of ranks with columns of their own."""
    rows = [metrics_of(step, 40, rank_max_mean_before=2.5, rank_max_mean=1 + 1 / step) for step in range(1, 41)]
    for row in rows:
        row |= {"imbalance_seconds": 0.2 / row["step"], "node_max_mean": 1.2, "borrowed_experts": 3}
    for row in rows[9::10]:
        row |= {"predicted_rank_max_mean": 1.02, "moved_experts": 4, "moved_bytes": 2**21, "move_seconds": 0.5}
    write_metrics(folder, rows)
    (folder / "config.toml").write_text(by_hand("[moe]\nranks_per_node = 2\n"))
    random = np.random.default_rng(0)
    write_loads(folder, random.integers(10, 1000, size=(4, 2, 8)))
    counts = random.integers(10, 1000, size=(8, 2, 4))
    counts[3, 1, 2] = 0
    write_loads(folder, counts, interval=5, name=RANK_LOAD_FILE)


def _everything(folder: Path) -> None:
    """Times, bytes, faults, with names that would be markup were they not text."""
    long_run(folder, 60)
    write_loads(folder, np.random.default_rng(0).integers(10, 1000, size=(6, 3, 8)))
    for step in (0, None, 20):
        note_event(folder, "failure" if step is None else "start", f"{HOSTILE} " * 5, step)
    (folder / FAULTS_FOLDER).mkdir()
    (folder / FAULTS_FOLDER / f"{HOSTILE}.txt").write_text(f"{HOSTILE} {'word ' * 60}\n")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    makes = (_small, _large, _without_loads, _with_nulls, _one_step, _ranks, _everything)
    for kind, make in zip(KINDS, makes, strict=False):
        folder = tmp_path_factory.mktemp("reports") / kind.replace(" ", "-")
        make(folder)
        paths[kind] = write_report(folder)
    named = write_metrics(tmp_path_factory.mktemp("several") / f"{HOSTILE} {'long' * 20}", [everything_of(1, 1)])
    folders = [paths[kind].parent for kind in ("small", "everything", "ranks", "one step", "with nulls")]
    paths["several"] = write_report([*folders, named], named.parent / "comparison.html")
    return paths


@pytest.fixture
def small(browser: Browser, reports: dict[str, Path]) -> Iterator[Page]:
    page = browser.open(reports["small"])
    yield page
    assert page.complaints() == []
    page.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_opens_cleanly_at_any_width(browser: Browser, reports: dict[str, Path], kind: str) -> None:
    page = browser.open(reports[kind])
    for width in (1400, 700, 400):
        page.resize(width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKS_OUT) == [], width
        assert page.evaluate(OVERLAPS) == [], width
    page.evaluate('document.querySelectorAll("details").forEach((details) => { details.open = true; })')
    assert page.evaluate("document.documentElement.scrollWidth") <= 400, "with its tables open"
    assert page.complaints() == []
    assert page.evaluate("document.title") != "run"
    own, *others = page.requests()
    assert own == reports[kind].as_uri()
    assert [url for url in others if not url.startswith("data:")] == []
    page.close()


def test_what_the_browser_draws_is_what_the_run_has(browser: Browser, reports: dict[str, Path]) -> None:
    expected = {"small": (7, 4, 1), "large": (9, 49, 0), "without loads": (7, 0, 0), "with nulls": (7, 0, 0)}
    expected["ranks"] = (7 + 4, 3 * 3, 0)
    for kind, figures in expected.items():
        page = browser.open(reports[kind])
        found = page.evaluate('[".chart", ".panel", ".alert"].map((one) => document.querySelectorAll(one).length)')
        assert tuple(found) == figures, kind
        flat = page.evaluate(
            '[...document.querySelectorAll(".chart")].filter((figure) => '
            'Math.max(...[...figure.querySelectorAll(".curve, circle")].map((one) => '
            "one.getBoundingClientRect().width)) < 2).length"
        )
        assert flat == 0, "a curve that takes no room"
        page.close()


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(browser: Browser, reports: dict[str, Path], dark: bool) -> None:
    """At least 4.5 to 1 for text and 3 to 1 for curves, as WCAG 2 asks."""
    page = browser.open(reports["small"], dark=dark)
    colours = page.evaluate(
        """(() => {
          const style = getComputedStyle(document.documentElement);
          const context = document.createElement("canvas").getContext("2d");
          const luminance = (name) => {
            context.fillStyle = style.getPropertyValue(name).trim();
            const [r, g, b] = context.fillStyle.match(/\\w\\w/g).map((hex) => parseInt(hex, 16) / 255)
              .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const names = ["page", "card", "alert", "text", "quiet", "bad", "first", "second", "third", "fourth",
            "fifth", "sixth", "seventh", "eighth"];
          return Object.fromEntries(names.map((name) => [name, luminance(`--${name}`)]));
        })()"""
    )
    page.close()

    def contrast(one: str, two: str) -> float:
        low, high = sorted((colours[one], colours[two]))
        return (high + 0.05) / (low + 0.05)

    assert (colours["text"] > colours["page"]) == dark
    assert min(contrast("text", place) for place in ("page", "card", "alert")) > 7
    assert min(contrast("quiet", place) for place in ("page", "card")) > 4.5
    curves = ("bad", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    assert min(contrast(curve, "card") for curve in curves) > 3


def _readout(page: Page, figure: str) -> str:
    return page.evaluate(f"document.querySelector('{figure} .readout').textContent")


def _point_at(page: Page, figure: str, x: float, y: float) -> None:
    """Move the pointer over a plot, to shares of its width and height."""
    left, top, width, height = page.evaluate(
        f"""(() => {{
          const svg = document.querySelector('{figure} :is(svg, .cells)');
          svg.scrollIntoView({{ block: "center" }});
          const box = svg.getBoundingClientRect();
          return [box.left, box.top, box.width, box.height];
        }})()"""
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + x * width, y=top + y * height)
    # Reading a map's pixels takes a moment.
    page.evaluate("new Promise((done) => setTimeout(done, 300))")


def test_pointing_at_a_curve_shows_that_step_in_all_of_them(small: Page) -> None:
    at_rest = _readout(small, "[data-chart=lr]")
    assert at_rest == "step 60: 3e-4"
    _point_at(small, "[data-chart=loss]", (30 - 1) / 59, 0.5)
    row = metrics_of(30, 60)
    assert _readout(small, "[data-chart=lr]") == f"step 30: {row['lr']:.5f}"
    training, validation = _readout(small, "[data-chart=loss]").split(" \u00b7 ")
    assert training == f"training {row['loss']:.3f} at step 30"
    assert validation.endswith((" at step 20", " at step 40"))
    _point_at(small, "[data-chart=loss]", -0.5, -2.0)
    assert _readout(small, "[data-chart=lr]") == at_rest


def test_pointing_at_a_map_shows_expert_step_and_load(small: Page) -> None:
    at_rest = _readout(small, '[data-panel="0"]')
    assert at_rest.startswith("last quarter: expert ")
    _point_at(small, '[data-panel="1"]', 2.5 / 6, 5.5 / 8)
    assert _readout(small, '[data-panel="1"]') == "expert 5, step 30: no tokens"
    _point_at(small, '[data-panel="0"]', 3.5 / 6, 1.5 / 8)
    assert _readout(small, '[data-panel="0"]').startswith("expert 1, step 40: ")
    ratio = float(_readout(small, '[data-panel="0"]').split(": ")[1].split()[0])
    counts = np.random.default_rng(0).integers(10, 1000, size=(6, 3, 8))
    counts[:, 0, 1] = counts[:, 0].mean(axis=1) * 2
    assert ratio == pytest.approx(counts[3, 0, 1] / counts[3, 0].mean(), rel=0.04), "half a step of the colours"


def test_maps_of_ranks_have_their_own_columns(browser: Browser, reports: dict[str, Path]) -> None:
    page = browser.open(reports["ranks"])
    _point_at(page, "[data-panel=rank-1]", 3.5 / 8, 2.5 / 4)
    assert _readout(page, "[data-panel=rank-1]") == "rank 2, step 20: no tokens"
    _point_at(page, "[data-panel=node-1]", 3.5 / 8, 1.5 / 2)
    assert _readout(page, "[data-panel=node-1]").startswith("node 1, step 20: ")
    cursors = """[...document.querySelectorAll(".panel .cursor")].map((line) => line.getAttribute("x1"))"""
    assert page.evaluate(cursors) == ["37.5%"] * 3 + ["43.75%"] * 6, "the same step in all of them"
    assert page.complaints() == []
    page.close()


def test_the_arrow_keys_do_the_same(small: Page) -> None:
    for plot, keys, expected in (
        ("[data-chart=lr]", ["ArrowRight", "ArrowRight", "ArrowLeft"], "step 1: "),
        ('[data-panel="1"]', ["ArrowRight", "ArrowRight", *["ArrowDown"] * 5], "expert 5, step 30: no tokens"),
    ):
        small.evaluate(f"document.querySelector('{plot} .plot').focus()")
        for key in keys:
            small.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        small.evaluate("new Promise((done) => setTimeout(done, 300))")
        assert _readout(small, plot).startswith(expected)


def _slide(page: Page, value: int) -> None:
    """As dragging the slider does."""
    page.evaluate(
        f"""(() => {{
          const slider = document.querySelector("#time-expert");
          slider.value = {value};
          slider.dispatchEvent(new Event("input", {{ bubbles: true }}));
        }})()"""
    )
    page.evaluate("new Promise((done) => setTimeout(done, 300))")


def test_the_slider_shows_all_layers_at_its_time(small: Page) -> None:
    assert small.evaluate("document.querySelector('.whole output').textContent") == "step 60"
    _slide(small, 2)
    assert small.evaluate("document.querySelector('.whole output').textContent") == "step 30"
    assert small.evaluate("document.querySelector('#time-expert').getAttribute('aria-valuetext')") == "step 30"
    # Each pixel is that of the layer's own map.
    drawn = small.evaluate(
        """(() => {
          const canvas = document.querySelector(".whole canvas");
          return [canvas.width, canvas.height, [...canvas.getContext("2d").getImageData(0, 0, 8, 3).data]];
        })()"""
    )
    counts = np.random.default_rng(0).integers(10, 1000, size=(6, 3, 8))
    counts[:, 0, 1] = counts[:, 0].mean(axis=1) * 2
    counts[2, 1, 5] = 0
    ratios = counts[2] / counts[2].mean(axis=1, keepdims=True)
    expected = [(*PALETTE[index], 255) for index in to_indices(ratios).flatten()]
    assert drawn[:2] == [8, 3]
    assert np.array(drawn[2]).reshape(-1, 4).tolist() == [list(colour) for colour in expected]
    layer, expert = np.unravel_index(ratios.argmax(), ratios.shape)
    assert _readout(small, ".whole").startswith(f"step 30: highest: layer {layer}, expert {expert}, ")
    _point_at(small, ".whole", 5.5 / 8, 1.5 / 3)
    assert _readout(small, ".whole") == "layer 1, expert 5, step 30: no tokens"


def test_the_slider_and_its_map_have_keys(small: Page) -> None:
    def press(*keys: tuple[str, int]) -> None:
        for key, code in keys:
            small.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code)
            small.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)
        small.evaluate("new Promise((done) => setTimeout(done, 300))")

    small.evaluate("document.querySelector('#time-expert').focus()")
    press(("ArrowLeft", 37), ("ArrowLeft", 37), ("ArrowLeft", 37))
    assert small.evaluate("document.querySelector('.whole output').textContent") == "step 30"
    small.evaluate("document.querySelector('#whole-expert').focus()")
    press(("ArrowDown", 40), *[("ArrowRight", 39)] * 5)
    assert _readout(small, ".whole") == "layer 1, expert 5, step 30: no tokens"


def test_everything_can_be_reached_by_the_tab_key(browser: Browser, reports: dict[str, Path]) -> None:
    page = browser.open(reports["everything"])
    seen = []
    for _ in range(80):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 40)"))
    links = page.evaluate("[...document.querySelectorAll('nav a')].map((link) => link.textContent)")
    assert "Faults and recoveries" in links
    summaries = page.evaluate("[...document.querySelectorAll('summary')].map((one) => one.textContent.slice(0, 40))")
    plots = page.evaluate("[...document.querySelectorAll('.plot[tabindex]')].map((plot) => plot.id)")
    assert {*links, *summaries, *plots, "time-expert"} <= set(seen)
    assert all(plots)
    page.close()


def test_without_its_script_the_page_has_its_figures(
    browser: Browser, reports: dict[str, Path], tmp_path: Path
) -> None:
    html, _, _ = reports["small"].read_text().partition("<script>")
    (tmp_path / "plain.html").write_text(html)
    page = browser.open(tmp_path / "plain.html")
    assert page.evaluate("document.querySelectorAll('.chart').length") == 7
    assert _readout(page, "[data-chart=lr]") == "step 60: 3e-4"
    rows = "[...document.querySelectorAll('table')].map((table) => table.tBodies[0].rows.length)"
    steps, layers, experts = page.evaluate(rows)
    assert (layers, experts) == (3, 8)
    assert steps >= 40
    page.close()


def test_the_page_refuses_what_is_not_its_own(browser: Browser, reports: dict[str, Path], tmp_path: Path) -> None:
    """Its policy keeps a report from loading anything, were a name in it ever taken for markup."""
    html = reports["without loads"].read_text().replace("<h1>", '<script>document.title = "run"</script><h1>')
    (tmp_path / "injected.html").write_text(html)
    page = browser.open(tmp_path / "injected.html")
    assert page.evaluate("document.title") != "run"
    assert any("Content Security Policy" in complaint for complaint in page.complaints())
    page.close()
