"""MLflow's UI as a person meets it, in a real browser: `make test-ui`.

Screenshots are kept in outputs/screenshots/ of the checkout.
"""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import pytest
from mlflow.entities import Run
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.helpers import ROOT, command, finish, fresh_store, start

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCREENSHOTS = ROOT / "outputs" / "screenshots"
PATIENCE = 30_000  # milliseconds that something on a page may take to appear
NAME = "mlp-64-32 sgd lr=0.1 bs=64 seed=0"
SMALL = ["dataset.train_size=5000", "training.compile=never", "training.device=cpu"]
SWEPT = ["optimizer.lr=0.03,0.3", "training.batch_size=32,128", "seed=0,1"]  # 8 jobs
EPOCHS, SWEEP_EPOCHS = 5, 4
NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.{}_v1', '{}')"
# points of each line; MLflow draws all of them twice
CURVES = """chart => [...new Set([...chart.querySelectorAll('.scatterlayer path.js-line')]
    .map(path => path.getAttribute('d')))]
    .map(line => (line.match(/[ML]/g) || []).length).filter(points => points > 1)"""
TICKS = "chart => [...chart.querySelectorAll('.xtick text')].map(tick => Number(tick.textContent))"
# how much the pixels differ: 0 for a blank page
CONTRAST = """image => {
    const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    context.drawImage(image, 0, 0);
    const reds = context.getImageData(0, 0, canvas.width, canvas.height).data
        .filter((_, i) => i % 4 == 0);
    return reds.reduce((a, b) => Math.max(a, b)) - reds.reduce((a, b) => Math.min(a, b));
}"""

browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(browser_path is None, reason="no browser: apt-get install chromium")

# A panel, and not the page, is scrolled to a picture in it.
SCROLL_PANEL = """image => {
    let panel = image.parentElement;
    while (!["auto", "scroll"].includes(getComputedStyle(panel).overflowY)) {
        panel = panel.parentElement;
    }
    panel.scrollTop += image.getBoundingClientRect().top - panel.getBoundingClientRect().top;
}"""


@dataclass(frozen=True)
class ServedUI:
    """`mnist-exp ui` on a store with a run and a sweep."""

    process: "subprocess.Popen[str]"
    address: str  # that it has printed
    run: Run
    sweep: Run
    children: list[Run]

    def page(self, path: str) -> str:
        root = self.address.partition("#")[0]
        experiment = self.run.info.experiment_id
        return f"{root}#/experiments/{experiment}/{path}?workflowType=machine_learning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ui")


@pytest.fixture(scope="module")
def store(folder: Path) -> str:
    """Filled as a person would; a process for each, as in life."""
    uri = fresh_store(folder)
    for words in (
        ["train", f"training.epochs={EPOCHS}", "hydra.run.dir=run"],
        ["train", "-m", *SWEPT, f"training.epochs={SWEEP_EPOCHS}", "hydra.sweep.dir=sweep"],
    ):
        status, out, err = command(*words, *SMALL, f"tracking.uri={uri}", folder=folder)
        assert status == 0, out + err
    return uri


@pytest.fixture(scope="module")
def served(store: str, folder: Path) -> Iterator[ServedUI]:
    client = mlflow.MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "mnist-exp"]
    runs = client.search_runs([experiment.experiment_id])
    (sweep,) = [run for run in runs if "sweep" in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (run,) = [run for run in runs if run is not sweep and run not in children]
    process = start(["ui", "--port", "0", f"tracking.uri={store}"], folder)
    try:
        assert process.stdout is not None
        said = re.match(r"the page is up: (http://\S+)\n", process.stdout.readline())
        assert said, process.communicate()
        assert process.stdout.readline() == "Ctrl-C ends it\n"
        yield ServedUI(process, said[1], run, sweep, children)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            finish(process)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # a browser that runs as root has no sandbox
    words = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser_path, args=words)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab in which nothing is asked of other machines."""
    elsewhere: list[str] = []

    def look(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1":
            elsewhere.append(url)

    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    context.set_default_timeout(PATIENCE)
    context.on("request", lambda request: look(request.url))
    for name, value in (("panelOpen", "false"), ("fab.autoOpenedOnFirstLoad", "true")):
        context.add_init_script(NO_ASSISTANT.format(name, value))
    yield context.new_page()
    context.close()
    assert elsewhere == []


@pytest.fixture(scope="module", autouse=True)
def patience() -> None:
    expect.set_options(timeout=PATIENCE)


def keep(page: Page, name: str) -> None:
    """A screenshot, once the page looks the same for a while."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.mouse.move(0, 0)  # no tooltip
    before = b""
    for _ in range(20):
        now = page.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")
        if now == before:
            break
        before = now
        page.wait_for_timeout(250)


def card(page: Page, title: str) -> Locator:
    """A chart, or a picture, with its title."""
    found = page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=title)
    return found.first


def check_curves(chart: Locator, count: int, epochs: int) -> None:
    """That lines are drawn, a point an epoch, over the epochs."""
    expect(chart.locator(".scatterlayer path.js-line").first).to_be_attached()
    chart.page.wait_for_function(
        f"([chart, count]) => ({CURVES})(chart).length >= count",
        arg=[chart.element_handle(), count],
    )
    points = chart.evaluate(CURVES)
    assert points.count(epochs) == count, points
    ticks = chart.evaluate(TICKS)
    assert len(ticks) > 1 and min(ticks) >= 1 and max(ticks) <= EPOCHS, ticks


def check_picture(picture: Locator) -> None:
    expect(picture).to_be_visible()
    picture.page.wait_for_function(
        "image => image.complete && image.naturalWidth > 100", arg=picture.element_handle()
    )
    assert picture.evaluate(CONTRAST) > 100


def open_list(page: Page, served: ServedUI, *, sweep: bool) -> None:
    """The page that the program prints; `sweep`: with the sweep's runs below it."""
    page.goto(served.address)
    expect(page.get_by_role("link", name=NAME, exact=True).first).to_be_visible()
    if sweep:
        row = page.locator(".ag-row").filter(has_text=served.sweep.info.run_name).first
        row.get_by_role("button").first.click()
        for child in served.children:
            expect(page.get_by_text(child.info.run_name, exact=True).first).to_be_visible()


def test_list_of_runs(page: Page, served: ServedUI) -> None:
    open_list(page, served, sweep=True)
    for column in (
        *("best/val_accuracy", "test/accuracy", "optimizer.lr", "training.batch_size", "seed"),
        *("dataset", "model"),
    ):
        header = page.locator(".ag-header-cell").get_by_text(column, exact=True)
        expect(header).to_be_in_viewport(ratio=1)
    link = page.get_by_role("link", name=NAME, exact=True)
    index = page.locator(".ag-row").filter(has=link).get_attribute("row-index")
    cells = page.locator(f".ag-center-cols-container [row-index='{index}'] .ag-cell")
    shown = cells.all_inner_texts()
    metrics = served.run.data.metrics
    accuracies = {f"{metrics[key]:g}" for key in ("best/val_accuracy", "test/accuracy")}
    assert {*accuracies, "0.1", "64", "0", "mnist", "mlp"} <= set(shown), shown
    for name in (served.run, served.sweep, *served.children):  # whole, without an ellipsis
        link = page.get_by_role("link", name=name.info.run_name, exact=True).first
        assert link.evaluate("link => link.scrollWidth <= link.parentElement.clientWidth")
    keep(page, "list")


def test_run(page: Page, served: ServedUI) -> None:
    page.goto(served.page(f"runs/{served.run.info.run_id}"))
    expect(page.get_by_role("heading", name=NAME)).to_be_visible()
    again = f"mnist-exp train training.epochs={EPOCHS} dataset.train_size=5000"
    expect(page.get_by_text(again).first).to_be_visible()
    expect(page.get_by_text("About this run")).to_be_in_viewport(ratio=1)
    keep(page, "run")


def test_charts_of_a_run(page: Page, served: ServedUI) -> None:
    page.set_viewport_size({"width": 1500, "height": 3600})  # what is out of view is not drawn
    page.goto(served.page(f"runs/{served.run.info.run_id}/model-metrics"))
    for key in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        chart = card(page, f"({key})")  # as its legend has it
        expect(chart.get_by_text(key.partition("/")[2], exact=True)).to_be_visible()
        check_curves(chart, 1, EPOCHS)
    # MLflow's slider is at 0 when the page is opened, before the first epoch
    card(page, "val/predictions").get_by_role("slider").press("ArrowRight")
    for key in ("train/first_30", "val/predictions", "test/mistakes", "test/confusion"):
        picture = card(page, key).locator("img").first
        picture.scroll_into_view_if_needed()  # the run's parameters stand before it
        check_picture(picture)
    page.set_viewport_size({"width": 1500, "height": 1000})
    curves = card(page, "(train/accuracy)")
    expect(curves).not_to_be_attached()
    page.mouse.move(850, 600)
    for _ in range(100):
        if curves.is_visible():
            break
        page.mouse.wheel(0, 100)
        page.wait_for_timeout(50)
    curves.evaluate("card => card.scrollIntoView()")
    for key in ("train/first_30", "val/predictions"):
        card(page, key).locator("img").first.evaluate(SCROLL_PANEL)
    keep(page, "charts")


def test_comparison_of_a_sweeps_runs(page: Page, served: ServedUI) -> None:
    open_list(page, served, sweep=True)
    page.goto(f"{page.url}&compareRunsMode=CHART")
    for key in ("val/accuracy", "val/loss", "train/loss"):
        chart = card(page, f"({key})")
        expect(chart.get_by_text(key, exact=True)).to_be_visible()
        check_curves(chart, len(served.children), SWEEP_EPOCHS)
    keep(page, "sweep")


def test_predictions_over_the_epochs(page: Page, served: ServedUI) -> None:
    page.goto(f"{served.address}&compareRunsMode=CHART")
    pictures = card(page, "val/predictions")
    pictures.scroll_into_view_if_needed()
    picture = pictures.locator("img").first
    check_picture(picture)
    seen = {picture.get_attribute("src")}
    slider = pictures.get_by_role("slider")
    for _ in range(1, EPOCHS):
        before = picture.get_attribute("src")
        slider.press("ArrowRight")
        expect(picture).not_to_have_attribute("src", before or "")
        check_picture(picture)
        seen.add(picture.get_attribute("src"))
    assert len(seen) == EPOCHS
    keep(page, "predictions")


def test_report_of_a_sweep(page: Page, served: ServedUI) -> None:
    page.goto(served.page(f"runs/{served.sweep.info.run_id}"))
    best = page.get_by_role("row", name="1 (chosen)")
    expect(best).to_be_visible()
    accuracy = f"{100 * served.sweep.data.metrics['best/val_accuracy']:.3f} %"
    expect(best).to_contain_text(accuracy)
    page.get_by_text("Show more").click()
    expect(
        page.get_by_text(re.compile(r"^mnist-exp train .*experiments=.*best\.yaml"))
    ).to_be_visible()
    keep(page, "report")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("leaderboard.md").first.click()
    expect(page.get_by_role("cell", name="1 (chosen)")).to_be_visible()
    page.get_by_text("heat_map_lr_batch_size.png").first.click()
    check_picture(page.locator("img[src^=blob]").first)
    keep(page, "heat_map")


def test_model(page: Page, served: ServedUI) -> None:
    (model,) = served.run.outputs.model_outputs
    page.goto(served.page(f"models/{model.model_id}"))
    expect(page.get_by_text("Takes float images [-1, 1, 28, 28]")).to_be_visible()
    expect(page.get_by_text(f"runs:/{served.run.info.run_id}/model").first).to_be_visible()
    keep(page, "model")
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("MLmodel", exact=True).first.click()
    expect(page.get_by_text("[-1, 1, 28, 28]").first).to_be_visible()
    page.get_by_text("serving_input_example.json").first.click()
    expect(page.get_by_text("inputs").first).to_be_visible()


def test_a_name_that_leads_here_from_elsewhere(served: ServedUI) -> None:
    parts = urlsplit(served.address)
    assert parts.hostname == "127.0.0.1" and parts.port
    for name, status in ((f"localhost:{parts.port}", 200), ("elsewhere.example", 403)):
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        connection.request("GET", "/", headers={"Host": name})
        assert connection.getresponse().status == status
        connection.close()


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    children = [child for child, parent in pairs if parent == pid]
    return children + [later for child in children for later in descendants(child)]


def test_end(served: ServedUI) -> None:
    """Ctrl-C: no traceback, no child, and the port is free. The last test: the server is gone."""
    children = descendants(served.process.pid)
    assert len(children) == 2  # MLflow's command, and its server; no jobs
    served.process.send_signal(signal.SIGINT)
    status, out, err = finish(served.process)
    assert (status, out) == (130, "")
    first, warning, last = err.splitlines()
    assert (first, last) == ("starting MLflow's server ...", "mnist-exp: interrupted")
    assert warning.endswith("invalid Host header: elsewhere.example")
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    with socket.create_server(("127.0.0.1", urlsplit(served.address).port or 0)):
        pass
