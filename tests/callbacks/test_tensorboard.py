"""TensorBoard on a run's folder, as a browser shows it."""

import os
import re
import shutil
import socket
import sys
import urllib.request

import pytest

from moco.training.board_layout import tag_of
from tests.conftest import run_program
from tests.processes import started, wait_until

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TEXT = """
const text = node => [...node.childNodes].map(child =>
    child.nodeType == Node.TEXT_NODE ? child.textContent
    : child.nodeType == Node.ELEMENT_NODE && !["STYLE", "SCRIPT"].includes(child.tagName)
    ? text(child) + (child.shadowRoot ? text(child.shadowRoot) : "") : "").join(" ");
return text(document.body).replace(/\\s+/g, " ");
"""
"""What a page says, in the shadow trees of its elements too."""
IMAGES = """
const images = node => [...node.querySelectorAll("*")].flatMap(child =>
    [...(child.tagName == "IMG" ? [child] : []), ...(child.shadowRoot ? images(child.shadowRoot) : [])]);
return images(document).filter(image => image.complete).map(image => [image.naturalWidth, image.naturalHeight]);
"""
"""The sizes of the images that have come."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A short run of the quickstart."""
    cwd = tmp_path_factory.mktemp("tensorboard")
    done = run_program(
        "moco.train", "+experiment=quickstart", "trainer.max_epochs=2", "evaluation.every_n_epochs=1",
        "evaluation.plots_every_n_epochs=1", "evaluation.diagnostics_every_n_steps=10", "hydra.run.dir=run", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cwd / "run"


@pytest.fixture(scope="module")
def address(run_folder):
    """Of a TensorBoard that is up and has read the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(run_folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with started(*command):
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(address), "TensorBoard has read the run")
        yield address


def is_ready(address):
    try:
        with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
            return b"knn/top1" in answer.read()
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser():
    if os.environ.get("MOCO_TEST_BROWSER") != "required":
        pytest.importorskip("selenium")
        if not (CHROMIUM and DRIVER):
            pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Without a sandbox it also starts as root; the projector needs WebGL, which without a GPU is SwiftShader's.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,2400",
                     "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"):  # fmt: skip
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def open_tab(browser, address, tab):
    browser.get(
        "about:blank"
    )  # the tabs differ in their fragment only, which would not load the page anew
    browser.get(f"{address}/#{tab}")


def wait_for_words(browser, *words):
    wait_until(
        lambda: all(word in browser.execute_script(TEXT) for word in words),
        f"the page says {words}",
    )


def test_the_first_screen_shows_what_one_looks_at_first(address, browser):
    open_tab(browser, address, "timeseries")
    expected = (
        "1_main", "1_main/1_train/loss", "1_main/2_knn/top1", "1_main/3_train/learning_rate",
        "1_main/4_contrast/top1", "2_health", "3_time", "4_debug",
    )  # fmt: skip
    # A card's title is in two parts, so that its end is always seen.
    wait_until(lambda: set(expected) <= set(tags_on(browser)), f"the page says {expected}")
    order = [tag for tag in tags_on(browser) if tag in expected]
    assert tuple(dict.fromkeys(order)) == expected


def tags_on(browser):
    """Return the groups and the tags that a page shows, from top to bottom."""
    text = browser.execute_script(TEXT).replace(" /", "/").replace("/ ", "/")
    return re.findall(r"[1-4]_[a-z]+(?:/[\w./]+)?", text)


def test_charts_overlay_what_belongs_together(address, browser):
    open_tab(browser, address, "custom_scalars")
    wait_for_words(browser, "Is it learning?", "loss, and the loss of chance")
    wait_for_words(browser, "1_main/1_train/loss", "2_health/train/loss_of_chance")


def logged_sizes(folder):
    """Return the sizes of the plots in a run's event file, by tag: (width, height) in px."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    sizes = {}
    for tag in events.Tags()["images"]:
        image = events.Images(tag)[0]
        sizes[tag] = (image.width, image.height)
    return sizes


def test_images_come_at_their_full_size(run_folder, address, browser):
    open_tab(browser, address, "images")
    sizes = logged_sizes(run_folder)
    wait_for_words(browser, "knn/neighbors", "knn/confusion", "views/query_above_key")
    expected = {sizes[tag_of(name)] for name in ("knn/neighbors", "views/query_above_key")}
    wait_until(
        lambda: expected <= {tuple(size) for size in browser.execute_script(IMAGES)},
        f"images of {expected}",
    )


def test_the_projector_shows_every_query_with_its_label(address, browser):
    open_tab(browser, address, "projector")
    for _ in range(2):  # a frame in a frame
        wait_until(lambda: browser.find_elements("tag name", "iframe"), "the projector's frame")
        browser.switch_to.frame(browser.find_elements("tag name", "iframe")[0])
    wait_for_words(
        browser, "Points: 360", "Dimension: 64", "features:00000 360x64", "10 colors"
    )  # of as many classes
    browser.switch_to.default_content()


def test_the_main_settings_stand_beside_the_knn_figure_before_those_of_the_command_line(
    address, browser
):
    open_tab(browser, address, "hparams")
    wait_for_words(browser, "knn/top1", "epoch/loss", "method.temperature", "Show Metrics")
    text = browser.execute_script(TEXT)
    settings = ("method", "backbone", "lr", "T", "K", "batch", "epochs")
    columns = text.split("Show Metrics")[1]
    places = [columns.index(f" {setting} ") for setting in settings[:5]]
    assert places == sorted(places)
    assert text.index("evaluation.every_n_epochs") < text.index("augmentation.mean")


def test_the_config_and_the_similarities_are_there(address, browser):
    open_tab(browser, address, "text")
    wait_for_words(browser, "config/text_summary", "key_momentum: 0.99")
    open_tab(browser, address, "histograms")
    wait_for_words(browser, "similarity/positive", "similarity/negative")
