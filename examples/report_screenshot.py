"""`make report-screenshot`: the report of a run as a browser shows it: light, dark, and on a phone.

python examples/report_screenshot.py out/report out/movie_reviews/report.html out/quick/report.html

writes out/report-light.png, -dark.png and -phone.png of the newest of these pages. Without Chromium it says
so and does nothing.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# name: width of the page, and whether the reader prefers the dark
VIEWS = {"light": (1000, False), "dark": (1000, True), "phone": (390, False)}
HEIGHT = 4000


def shoot(browser: str, page: Path, target: Path, width: int, dark: bool) -> None:
    """One picture. A browser's window has a least width, so a narrow page stands in a frame."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}"'
            f' style="width:{width}px;height:{HEIGHT}px;border:0"></iframe>',
            encoding="utf-8",
        )
        command = [
            browser,
            *("--headless", "--disable-gpu", "--hide-scrollbars"),
            # in a container there is no user whom the browser's own walls could be built for
            "--no-sandbox",
            # 0 is the dark, 1 the light
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder}/profile",
            f"--window-size={max(width, 500)},{HEIGHT}",
            f"--screenshot={target.resolve()}",
            frame.as_uri(),
        ]
        subprocess.run(command, check=True, timeout=120, capture_output=True)


def main() -> int:
    """Every view; says what it wrote."""
    stem, pages = Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]]
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"report-screenshot: skipped, no browser of {', '.join(BROWSERS)} was found")
        return 0
    there = [each for each in pages if each.is_file()]
    if not there:
        print(f"report-screenshot: {pages[0]} is not there; `make demo` writes it", file=sys.stderr)
        return 1
    page = max(there, key=lambda each: each.stat().st_mtime)
    stem.parent.mkdir(parents=True, exist_ok=True)
    for name, (width, dark) in VIEWS.items():
        target = stem.with_name(f"{stem.name}-{name}.png")
        try:
            shoot(browser, page, target, width, dark)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"report-screenshot: skipped, {browser} could not: {error}")
            return 0
        print(f"report-screenshot: {target}, {target.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
