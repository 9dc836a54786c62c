"""A real headless browser, where this machine has one."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def measure_widths(pages: list[str], width: int, folder: Path) -> list[int]:
    """Widths in pixels that pages take on a screen of `width`: more than that, and they scroll sideways.

    Each page is opened in a frame of its own that is as wide as the screen; a script around them reads the widths, for a page
    itself runs none.
    """
    frames = "".join(f'<iframe width="{width}" height="700" srcdoc="{html.escape(page)}"></iframe>' for page in pages)
    around = folder / "around.html"
    around.write_text(
        f"<!doctype html><body>{frames}<p id=found></p><script>onload = () => {{ found.textContent = 'found ' + "
        "[...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth).join(' ') + ' end' }</script>",
        encoding="utf-8",
    )
    shown = open_page(around, folder)
    found = re.search(r">found ([\d ]+) end<", shown)
    assert found, f"the script around the pages did not run: {shown[-2000:]}"
    return [int(number) for number in found[1].split()]


def open_page(page: Path, folder: Path) -> str:
    """A page as it is once its scripts have run; `folder` is for the browser's own files."""
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here to open the page in: none of {', '.join(NAMES)}")
    # A sandbox needs rights that root in a container lacks; a home of its own keeps the user's browser out of it.
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/browser", "--dump-dom"]
    command, env = [browser, *options, page.as_uri()], {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)
    assert not done.returncode, f"{browser} ended with {done.returncode} and said {done.stderr[-2000:]}"
    return done.stdout
