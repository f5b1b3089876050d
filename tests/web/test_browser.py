"""The page in a real browser: headless Chromium, as a person uses it with a mouse, with the
keyboard, and on a phone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webs
from PIL import Image

from retrieval.gallery import Gallery
from retrieval.web import api, app
from retrieval.web.batching import QueryBatcher

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:  # the whole file, so that it is told in one line
    pytest.skip(
        "no Chromium with its driver here: apt-get install chromium chromium-driver",
        allow_module_level=True,
    )
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --disable-extensions"
)
WAIT = 5  # seconds, at most
Browser = Any


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def address(photos: Path) -> Iterator[str]:
    """A real server of a small gallery, two of whose names would be markup."""
    with pytest.MonkeyPatch.context() as patch:
        webs.install(patch.setattr)
        index = webs.make(photos, 60)
        with (
            Gallery(index) as gallery,
            QueryBatcher(gallery) as batcher,
            webs.running(api.create(batcher, hosts=app.LOOPBACK)) as base,
        ):
            yield base


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests, with a new profile."""
    home = tmp_path_factory.mktemp("profile")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={home}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER, env={**os.environ, "HOME": str(home)})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Browser]:
    """The start of the page on a desk; at the end, no script has complained, and nothing came from
    elsewhere."""
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1200, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    chromium.execute_cdp_cmd(
        "Storage.clearDataForOrigin", {"origin": address, "storageTypes": "local_storage"}
    )
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    chromium.get(address)
    until(chromium, lambda: len(tiles(chromium)) == 36)
    yield chromium
    complaints = [line["message"] for line in chromium.get_log("browser")]
    assert [] == [text for text in complaints if "Failed to load resource" not in text]
    events = [json.loads(line["message"])["message"] for line in chromium.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert [] == [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))]


def until(browser: Browser, condition: Callable[[], Any]) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT, poll_frequency=0.02).until(lambda _: condition())


def js(browser: Browser, code: str, *values: Any) -> Any:
    return browser.execute_script(f"return {code}", *values)


def by_id(browser: Browser, name: str) -> Any:
    return browser.find_element("id", name)


def tiles(browser: Browser) -> list[Any]:
    """The pictures of the grid that are shown."""
    return js(browser, "[...document.querySelectorAll('.tile:not([hidden]) .pick')]")


def titles(browser: Browser) -> list[str]:
    return js(
        browser, "[...document.querySelectorAll('.tile:not([hidden]) .pick')].map(one => one.title)"
    )


def text(browser: Browser, name: str) -> str:
    return js(browser, "document.getElementById(arguments[0]).textContent", name)


def marks(browser: Browser) -> list[str]:
    return js(browser, "[...document.querySelectorAll('.mark')].map(one => one.textContent)")


def upload(browser: Browser, *files: Path) -> None:
    by_id(browser, "file").send_keys("\n".join(map(str, files)))


def searched(browser: Browser) -> None:
    until(browser, lambda: "among" in text(browser, "status"))


def press(browser: Browser, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser, duration=0).send_keys(*keys).perform()


def test_start(page: Browser) -> None:
    """The start shows pictures from all over the gallery, all of them loaded, and more on
    demand."""
    assert "photos.index" in until(page, lambda: page.title if "photos" in page.title else "")
    assert "60 images" in text(page, "status")
    until(
        page,
        lambda: js(
            page,
            "[...document.querySelectorAll('.frame img')].slice(0, "
            "8).every(one => one.naturalWidth === 40)",
        ),
    )
    by_id(page, "more").click()
    until(page, lambda: len(tiles(page)) == 60)
    assert 60 == len(set(titles(page)))
    assert not by_id(page, "more").is_displayed()


def test_upload_and_click_on(page: Browser, photos: Path) -> None:
    """An upload gives scored results beside the query; a click on one searches on with it; back
    leads back."""
    upload(page, photos / "photos" / "0010.png")
    searched(page)
    assert 24 == len(tiles(page))
    assert ("0010.png", ["the same file"]) == (titles(page)[0], marks(page))
    assert "0010.png" == text(page, "asked")
    assert "in the gallery itself" in text(page, "note")
    assert js(page, "document.querySelector('#pictures img').naturalWidth") == 40
    scores = js(
        page, "[...document.querySelectorAll('.score')].map(one => Number(one.textContent))"
    )
    assert sorted(scores, reverse=True) == scores
    second = titles(page)[1]
    tiles(page)[1].click()
    until(page, lambda: text(page, "asked") == second.rpartition("/")[2])
    searched(page)
    assert second not in titles(page)
    page.back()
    until(page, lambda: text(page, "asked") == "0010.png")
    searched(page)
    page.back()
    until(page, lambda: text(page, "heading") == "Or begin with one of these")


def test_a_new_picture_by_drop_and_paste(page: Browser, photos: Path, tmp_path: Path) -> None:
    """A picture that is dropped, or pasted, is searched with; a pasted text is answered in
    words."""
    give = """
        const canvas = new OffscreenCanvas(30, 30); canvas.getContext('2d').fillRect(0, 0, 20, 20);
        const [kind, done] = arguments;
        canvas.convertToBlob().then((blob) => {
          const data = new DataTransfer();
          if (kind === 'text') data.setData('text/plain', 'hello');
          else data.items.add(new File([blob], `${kind}.png`, {type: 'image/png'}));
          const event = kind === 'drop'
            ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent('paste', {clipboardData: data, bubbles: true});
          document.body.dispatchEvent(event);
          done();
        });"""
    for kind in ("drop", "paste"):
        page.execute_async_script(give, kind)
        until(page, lambda kind=kind: text(page, "asked") == f"{kind}.png")
        searched(page)
    page.execute_async_script(give, "text")
    until(page, lambda: "holds no picture" in text(page, "message-text"))


def test_several_pictures(page: Browser, photos: Path) -> None:
    """Several pictures are one search, and are all shown."""
    upload(page, photos / "photos" / "0010.png", photos / "photos" / "0011.png")
    searched(page)
    assert "2 pictures together" == text(page, "asked")
    assert 2 == js(page, "document.querySelectorAll('#pictures img').length")


def test_controls(page: Browser, tmp_path: Path) -> None:
    """k asks anew; the threshold leaves out, down to nothing, which is said with the best score."""
    (tmp_path / "new.png").write_bytes(webs.png((7, 7, 7)))
    upload(page, tmp_path / "new.png")
    searched(page)
    js(
        page,
        "(k => { k.value = '48'; k.dispatchEvent(new Event('change')) "
        "})(document.querySelector('#k'))",
    )
    until(page, lambda: len(tiles(page)) == 48)
    searched(page)
    fifth = float(js(page, "document.querySelectorAll('.score')[4].textContent"))
    move = (
        "(t => { t.value = arguments[0]; t.dispatchEvent(new Event('input')) "
        "})(document.querySelector('#threshold'))"
    )
    js(page, move, round(fifth - 0.005, 2))
    assert 5 <= len(tiles(page)) < 48
    js(page, move, 1)
    assert [] == tiles(page)
    assert "Nothing found" == text(page, "message-title")
    assert "the best has 0." in text(page, "message-text")
    by_id(page, "message-act").click()
    assert 48 == len(tiles(page))


def test_keyboard(page: Browser, photos: Path) -> None:
    """Arrows move a visible focus, Enter opens, arrows turn over, Escape closes, Space searches, /
    goes to the upload."""
    from selenium.webdriver.common.keys import Keys

    def at() -> int:
        return int(js(page, "document.activeElement.dataset.i ?? -1"))

    press(page, Keys.ARROW_DOWN)
    assert 0 == at()
    press(page, Keys.ARROW_RIGHT)
    assert 1 == at()
    assert "solid" == js(page, "getComputedStyle(document.activeElement).outlineStyle")
    press(page, Keys.ARROW_DOWN)
    row = at() - 1
    assert row > 2
    press(page, Keys.ARROW_UP, Keys.ARROW_UP, Keys.END, Keys.HOME, Keys.ARROW_RIGHT)
    assert 1 == at()
    opened, following = titles(page)[1], titles(page)[2]
    press(page, Keys.ENTER)
    until(page, lambda: js(page, "document.querySelector('#detail').open"))
    assert opened.rpartition("/")[2] == text(page, "detail-name")
    until(page, lambda: "40 × 30 pixels" in text(page, "detail-facts"))
    until(page, lambda: js(page, "document.querySelector('#detail-image').naturalWidth"))
    press(page, Keys.ARROW_RIGHT)
    assert following.rpartition("/")[2] == text(page, "detail-name")
    press(page, Keys.ESCAPE)
    until(page, lambda: not js(page, "document.querySelector('#detail').open"))
    # the browser gives the focus back first, and tells the page of the closing then
    until(page, lambda: at() == 2)
    press(page, Keys.SPACE)
    until(page, lambda: text(page, "asked") == following.rpartition("/")[2])
    searched(page)
    until(page, lambda: at() == 0)
    press(page, "/")
    assert "choose" == js(page, "document.activeElement.id")
    press(page, Keys.ESCAPE)
    until(page, lambda: text(page, "heading") == "Or begin with one of these")


def test_detail(page: Browser) -> None:
    """The detail view has the other paths of the same bytes, and searches with its picture."""
    page.get(f"{page.current_url}?id=5")
    searched(page)
    js(
        page,
        "(k => { k.value = '96'; k.dispatchEvent(new Event('change')) "
        "})(document.querySelector('#k'))",
    )
    until(page, lambda: len(tiles(page)) == 59)
    searched(page)
    js(
        page,
        "document.querySelectorAll('.look')[arguments[0]].click()",
        titles(page).index("0000.png"),
    )
    until(page, lambda: js(page, "document.querySelector('#detail').open"))
    assert "more/copy.png" == text(page, "detail-paths")
    assert "Score" in text(page, "detail-facts")
    assert "/files/" in by_id(page, "detail-file").get_attribute("href")
    by_id(page, "detail-search").click()
    until(page, lambda: text(page, "asked") == "0000.png")
    searched(page)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 40, "PNG of 48 bytes"),
        (b"x" * 25_100_000, "25 MB"),
    ],
)
def test_broken_uploads(page: Browser, tmp_path: Path, data: bytes, words: str) -> None:
    """An empty, foreign, broken or huge file is answered in words that name it, and the next search
    works."""
    (tmp_path / "bad.png").write_bytes(data)
    upload(page, tmp_path / "bad.png")
    until(page, lambda: words in text(page, "message-text"))
    assert "bad.png" in text(page, "message-text")
    assert by_id(page, "message-act").is_displayed()
    Image.new("RGB", (30, 30), (3, 200, 3)).save(tmp_path / "good.png")
    upload(page, tmp_path / "good.png")
    searched(page)
    assert not by_id(page, "message").is_displayed()


def test_a_picture_that_went(page: Browser, photos: Path) -> None:
    """A picture whose file is gone says so in the grid and in the detail view."""
    gone = photos / "photos" / "0020.png"
    data = gone.read_bytes()
    gone.unlink()
    try:
        by_id(page, "more").click()
        until(page, lambda: len(tiles(page)) == 60)
        number = titles(page).index("0020.png")
        js(page, "document.querySelectorAll('.pick')[arguments[0]].scrollIntoView()", number)
        until(page, lambda: "cannot be shown" in tiles(page)[number].text)
        js(page, "document.querySelectorAll('.look')[arguments[0]].click()", number)
        until(page, lambda: "0020.png is not there any more" in text(page, "detail-problem"))
    finally:
        gone.write_bytes(data)


def test_marks_of_results(page: Browser, photos: Path) -> None:
    """Results are marked where their file went or changed, for the eye and for a screen reader, and
    so are further paths."""
    gone, copy = photos / "photos" / "0020.png", photos / "photos" / "more" / "copy.png"
    data, before = gone.read_bytes(), copy.read_bytes()
    gone.unlink()
    copy.write_bytes(b"something else")
    try:
        upload(page, photos / "photos" / "0000.png")
        searched(page)
        js(
            page,
            "(k => { k.value = '96'; k.dispatchEvent(new Event('change')) "
            "})(document.querySelector('#k'))",
        )
        until(page, lambda: len(tiles(page)) == 60)
        assert ["the same file", "missing"] == marks(page)
        label = js(
            page,
            "arguments[0].getAttribute('aria-label')",
            tiles(page)[titles(page).index("0020.png")],
        )
        assert ", missing: search with it" in label
        js(page, "document.querySelector('.look').click()")
        until(page, lambda: "Note" in text(page, "detail-facts"))
        assert "the same file" in text(page, "detail-facts")
        assert "more/copy.png (changed since)" == text(page, "detail-paths")
    finally:
        gone.write_bytes(data)
        copy.write_bytes(before)


def test_names_are_text(page: Browser) -> None:
    """File names that would be markup are shown as they are, and run nothing."""
    by_id(page, "more").click()
    until(page, lambda: len(tiles(page)) == 60)
    assert {webs.EVIL, f"more/{webs.HANDLER}"} <= set(titles(page))
    for name in (webs.EVIL, f"more/{webs.HANDLER}"):
        js(
            page,
            "document.querySelectorAll('.look')[arguments[0]].click()",
            titles(page).index(name),
        )
        assert name.rpartition("/")[2] == text(page, "detail-name")
        by_id(page, "close").click()
    assert 0 == js(page, "document.querySelectorAll('body script, main [onerror]').length")


@pytest.mark.parametrize("width", [390, 320])
def test_phone(page: Browser, photos: Path, width: int) -> None:
    """On a phone nothing is wider than the screen: the start, the results, the detail view."""
    phone = {"width": width, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    wide = "[document.documentElement.scrollWidth, innerWidth]"
    assert [width, width] == js(page, wide)
    upload(page, photos / "photos" / "0010.png")
    searched(page)
    assert [width, width] == js(page, wide)
    assert 2 == js(
        page,
        "getComputedStyle(document.querySelector('#grid')).gridTemplateColumns.split(' ').length",
    )
    js(page, "document.querySelector('.look').click()")
    until(page, lambda: "pixels" in text(page, "detail-facts"))
    assert [width, width] == js(page, wide)
    assert js(page, "(f => f.scrollWidth <= f.clientWidth)(document.querySelector('.facts'))")


def test_themes(page: Browser) -> None:
    """The page follows the system's colours until a person chooses others, which are kept."""

    def ground() -> str:
        return js(page, "getComputedStyle(document.body).backgroundColor")

    bright = ground()
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    try:
        dark = ground()
        assert bright != dark
        by_id(page, "theme").click()
        assert (bright, "Theme: Light") == (ground(), text(page, "theme"))
        page.refresh()
        assert (bright, "Theme: Light") == (ground(), text(page, "theme"))
        by_id(page, "theme").click()
        assert dark == ground()
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_no_server(page: Browser, photos: Path) -> None:
    """A server that has gone is said, with a way to try again."""
    page.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    page.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        upload(page, photos / "photos" / "0010.png")
        until(page, lambda: "does not answer" in text(page, "message-text"))
    finally:
        page.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {**offline, "offline": False, "downloadThroughput": -1, "uploadThroughput": -1},
        )
    by_id(page, "message-act").click()
    searched(page)


def test_the_token_leaves_the_address(
    chromium: Browser, address: str, photos: Path, tmp_path: Path
) -> None:
    """A link with the token opens the page, which goes on by its cookie and hides the token."""
    with (
        Gallery(photos / "photos.index") as gallery,
        QueryBatcher(gallery) as batcher,
        webs.running(api.create(batcher, token="open sesame")) as base,
    ):
        chromium.get(base)
        until(chromium, lambda: "locked" in chromium.page_source)
        chromium.get(f"{base}/?token=open+sesame")
        until(chromium, lambda: len(tiles(chromium)) == 36)
        assert f"{base}/" == chromium.current_url
        chromium.refresh()
        until(chromium, lambda: len(tiles(chromium)) == 36)
