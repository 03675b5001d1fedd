"""The pictures of docs/howto/report.md: ``python docs/screenshots.py report.html graft.html``, reports of two runs.

The first one is of ``runs/magformer_embedded``, the second of ``runs/graft_embedded``.

Needs selenium, Chromium and its driver. Every picture is looked at before it is committed.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver

FOLDER = Path(__file__).parent
SIZE = (1000, 700)
COLOURS = 128  # of a picture, to keep it small
THEME = "document.documentElement.dataset.theme = arguments[0]"
QUERY = """
const form = document.querySelector(".filters");
form.elements.low.value = "30";
form.elements.only.value = "won";
form.dispatchEvent(new Event("input", { bubbles: true }));
const head = document.querySelector(".head");
head.click();
head.scrollIntoView();
"""
MAP = """
const plane = document.querySelector(".map svg");
plane.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
document.querySelector(".map").parentElement.previousElementSibling.scrollIntoView();
"""
SAMPLE = """
const form = document.querySelector(".filters");
form.elements.low.value = "30";
form.dispatchEvent(new Event("input", { bubbles: true }));
const head = document.querySelector(".head");
head.click();
head.scrollIntoView();
"""
SHOTS = (
    ("report", 0, "light", ""),
    ("report_query", 0, "light", QUERY),
    ("report_query_dark", 0, "dark", ""),
    ("report_map", 0, "dark", MAP),
    ("report_modalities", 1, "light", SAMPLE),
)


def main(pages: list[str]) -> None:
    """Draw them."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    width, height = SIZE
    for word in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", f"window-size={width},{height + 140}"):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        opened = -1
        for name, page, theme, script in SHOTS:
            if page != opened:
                driver.get(Path(pages[page]).resolve().as_uri())
                opened = page
            driver.execute_script(THEME, theme)
            driver.execute_script(script)
            picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
            picture.quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    main(sys.argv[1:])
