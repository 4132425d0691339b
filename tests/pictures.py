"The pictures of the README, taken anew from what the last `recsys run` here left: python tests/pictures.py (wants Chromium)."
import shutil, subprocess
from pathlib import Path

from playwright.sync_api import sync_playwright
from shop import COMMAND, ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
INTO = ROOT/"nbs/docs/pictures"

def storefront(page):
    "A list after two products went into the cart."
    p = subprocess.Popen([COMMAND, "serve", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        page.goto(p.stdout.readline().rpartition(" ")[2].strip())
        page.get_by_label("A user of the shop").fill("1111"); page.keyboard.press("Enter"); page.locator("#told", has_text="You are 1111 now").wait_for()
        for _ in range(2): page.locator("#list button.add").first.click(); page.locator("#told", has_text="is in the cart").wait_for()
        page.wait_for_timeout(1000)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=INTO/"storefront.png")
    finally: p.terminate(); p.wait(30)

def run(page, job: str):
    "The page of a job of the newest run."
    page.goto(max((ROOT/"reports/runs").glob(f"20*/{job}.html")).as_uri())
    page.screenshot(path=INTO/f"{job}.png")

if __name__ == "__main__":
    INTO.mkdir(exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1100, height=760), color_scheme="light", reduced_motion="reduce")
        run(page, "evaluate"); storefront(page)
        browser.close()
