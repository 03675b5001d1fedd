"""The page in a browser: a picture in, a box, filters, writes, and nothing that leaves the service."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from served import TOKEN, Process, make_store, picture

DROP = """
const [bytes, kind] = arguments, data = new DataTransfer();
data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], "a.png", {type: "image/png"}));
const event = kind === "paste" ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
  : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
document.getElementById("drop").dispatchEvent(event);
"""


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium, or no chromedriver, is installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{word}")
    for word in ("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream", f"user-data-dir={tmp_path / 'p'}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield made
    made.quit()


@pytest.mark.slow
def test_the_page_in_a_browser(browser, tmp_path):
    import base64
    import json

    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    pytest.importorskip("fastapi")
    served = Process(make_store(tmp_path))
    try:
        address = f"http://127.0.0.1:{served.client.port}/"
        browser.get(f"{address}#token={TOKEN}")
        wait = WebDriverWait(browser, 15, poll_frequency=0.05)

        def find(name):
            return browser.find_element(By.ID, name)

        def said(text):
            wait.until(lambda _: text in find("said").text, f"'{text}', not '{find('said').text}'")

        def rows():
            return [int(item.get_attribute("data-row")) for item in browser.find_elements(By.CSS_SELECTOR, "#results li")]

        def give(image, kind="drop"):
            from served import file_of

            browser.execute_script(DROP, base64.b64encode(file_of(image)).decode(), kind)
            wait.until(lambda _: find("go").is_enabled())
            wait.until(lambda _: browser.execute_script("return document.getElementById('query').naturalWidth") > 0)

        def search():
            find("go").click()
            wait.until(lambda _: "of" in find("said").text and "images" in find("said").text)

        wait.until(lambda _: "24 images" in find("about").text)
        assert find("token").get_attribute("value") == TOKEN and "token" not in browser.current_url
        # drop, and every image is loaded
        give(picture(5))
        search()
        said("20 of 24 images")
        assert rows() == [item["row"] for item in served.client.search(picture(5), k=20)]
        first = browser.find_element(By.CSS_SELECTOR, "#results li")
        assert "label 2, camera 1" in first.text and "99.3 %, same" in first.text
        loaded = "return [...document.querySelectorAll('#results img')].slice(0, 4).every((each) => each.naturalWidth > 0)"
        wait.until(lambda _: browser.execute_script(loaded))
        # filters and re-ranking
        Select(find("cameras")).select_by_value("2")
        find("labels").send_keys("1, 3")
        search()
        said("4 of 4 images")
        assert sorted(rows()) == [2, 3, 10, 11]
        find("labels").clear()
        Select(find("cameras")).select_by_value("")
        find("rerank").click()
        search()
        said("20 of 24 images")
        assert rows() == [item["row"] for item in served.client.search(picture(5), k=20, rerank=100)]
        find("rerank").click()
        # paste, and a box drawn with the pointer
        from PIL import Image

        sheet = Image.new("RGB", (200, 200))
        sheet.paste(picture(9, (80, 160)), (100, 20))
        give(sheet, "paste")
        drawn = """
        const [x, y, w, h] = arguments, stage = document.getElementById("stage");
        const frame = document.getElementById("query").getBoundingClientRect();
        const at = (kind, x, y) => stage.dispatchEvent(new PointerEvent(kind, {clientX: frame.left + x * frame.width / 200,
          clientY: frame.top + y * frame.height / 200, pointerId: 1, bubbles: true}));
        stage.setPointerCapture = () => {};
        at("pointerdown", x, y); at("pointermove", x + w / 2, y + h); at("pointerup", x + w, y + h);
        """
        browser.execute_script(drawn, 100, 20, 80, 160)
        search()
        assert rows()[0] == 9
        find("whole").click()
        search()
        assert rows() == [item["row"] for item in served.client.search(sheet, k=20)]
        # same or not, enrol, delete
        browser.execute_script(drawn, 100, 20, 80, 160)
        find("label").send_keys("zoe")
        find("enrol").click()
        said("Enrolled as image 24.")
        wait.until(lambda _: "25 images" in find("about").text)
        search()
        best = {row: item for row, item in zip(rows(), browser.find_elements(By.CSS_SELECTOR, "#results li"))}
        assert "label zoe" in best[24].text
        best[24].find_element(By.XPATH, ".//button[text()='Same']").click()
        said("Kept: image 24 is the same.")
        best[0].find_element(By.XPATH, ".//button[text()='Not the same']").click()
        said("Kept: image 0 is not the same.")
        pairs = served.client.ask("GET", "/api/feedback.csv?form=pairs")[1].decode().splitlines()
        assert [line.split(",")[2] for line in pairs[1:]] == ["1", "0"]
        best[24].find_element(By.XPATH, ".//button[text()='Delete']").click()
        browser.switch_to.alert.accept()
        said("Image 24 is deleted.")
        wait.until(lambda _: "24 images" in find("about").text)
        # a photo from the (fake) camera
        find("photo").click()
        wait.until(lambda _: browser.execute_script("return document.getElementById('video').videoWidth") > 0)
        find("click").click()
        wait.until(lambda _: not find("shoot").is_displayed())
        search()
        said("20 of 24 images")
        # mistakes are told
        find("k").clear()
        find("k").send_keys("3")
        find("token").clear()
        find("token").send_keys("wrong")
        find("enrol").click()
        said("401: this needs the service's token.")
        # no request left the service, and nothing was written to the console but that refusal
        asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [each["params"] for each in asked if each["method"] == "Network.requestWillBeSent"]
        own = [each for each in sent if each["documentURL"].startswith(address)]  # not those of Chromium's first tab
        addresses = {each["request"]["url"] for each in own}
        assert addresses and all(each.startswith((address, "blob:", "data:")) for each in addresses), addresses
        complaints = [entry["message"] for entry in browser.get_log("browser")]
        assert all("401" in each for each in complaints), complaints
        if os.environ.get("RELREID_SCREENSHOT"):
            browser.save_screenshot(os.environ["RELREID_SCREENSHOT"])
    finally:
        served.end()
