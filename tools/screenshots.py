"""Write screenshots of every page: `python tools/screenshots.py FOLDER RUN [--out FOLDER]`.

The script serves the folder itself and uses the system's Chromium (or $CHROMIUM). It writes
<page>.png and <page>-dark.png. With `--cascade NAME` it writes only the verdict and the figure of
one cascade, as cascade-NAME.png.
"""

import argparse
import os
import shutil
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from geodiag.dashboard.serve import DashboardServer

PAGES = ("runs", "overview", "cascade", "gain", "routing", "activations", "events")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def shoot(page: Page, base: str, run: str, name: str, query: str, target: Path, full: bool) -> None:
    """Write a screenshot of one page after its charts are drawn."""
    page.goto(f"{base}/" if name == "runs" else f"{base}/run/{run}/{name}{query}")
    page.wait_for_selector(".card")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(900)
    page.mouse.move(5, 400)
    page.screenshot(path=str(target), full_page=full)
    print(target)


def shoot_cascade(page: Page, base: str, run: str, query: str, target: Path) -> None:
    """Write a screenshot of the verdict and the cascade figure alone."""
    page.goto(f"{base}/run/{run}/cascade{query}")
    page.wait_for_selector("#cascade-picture .main-svg")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(900)
    page.mouse.move(5, 5)
    boxes = [
        page.locator(place).first.bounding_box()
        for place in ("#cascade-verdict .card", ".split .column .card")
    ]
    (x, y), bottom = (boxes[0]["x"], boxes[0]["y"]), boxes[1]["y"] + boxes[1]["height"]
    clip = {"x": x - 8, "y": y - 8, "width": boxes[0]["width"] + 16, "height": bottom - y + 16}
    page.screenshot(path=str(target), clip=clip, full_page=True)
    print(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("run", help="name of the run that is opened")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "screenshots"
    )
    parser.add_argument("--pages", nargs="*", default=PAGES)
    parser.add_argument("--themes", nargs="*", default=("light", "dark"))
    parser.add_argument("--query", default="", help="e.g. '?steps=300-480'")
    parser.add_argument("--size", default="1440x900")
    parser.add_argument("--cascade", metavar="NAME", help="only the cascade, as cascade-NAME.png")
    parser.add_argument("--full", action="store_true", help="the whole page, not the window")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    served = DashboardServer(args.runs, "127.0.0.1", 0, None)
    threading.Thread(target=served.run, daemon=True).start()
    width, height = map(int, args.size.split("x"))
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        base = f"http://127.0.0.1:{served.port}"
        for theme in args.themes:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=theme
            )
            page = context.new_page()
            page.on(
                "console",
                lambda m: (
                    print("console:", m.type, m.text) if m.type in ("error", "warning") else None
                ),
            )
            page.on("pageerror", lambda e: print("page error:", e))
            page.goto(served.url)
            dark = "-dark" if theme == "dark" else ""
            if args.cascade:
                shoot_cascade(
                    page, base, args.run, args.query, args.out / f"cascade-{args.cascade}{dark}.png"
                )
                context.close()
                continue
            for name in args.pages:
                target = args.out / f"{name}{dark}.png"
                shoot(page, base, args.run, name, args.query, target, args.full)
            context.close()
        browser.close()
    served.stop()


if __name__ == "__main__":
    main()
