"""The built site in a browser: `make docs`, then this, where there is a Chromium."""

from __future__ import annotations

import functools
import http.server
import json
import queue
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import minilora

HERE = Path(__file__).parent
SITE = HERE.parent / "site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (1300, 390)
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site and the page that drives it, and takes what that page sends back."""

    def translate_path(self, path: str) -> str:
        if path.startswith("/drive_site.html"):
            return str(HERE / "drive_site.html")
        return super().translate_path(path)

    def do_POST(self) -> None:
        self.server.seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    handler = functools.partial(Handler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.seen = queue.SimpleQueue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def browser(tmp_path):
    """Return a function that opens an address in a browser, which is closed in the end."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("there is no Chromium")
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: make docs")
    opened = []

    def open_address(address):
        command = [program, *QUIET, f"--user-data-dir={tmp_path}", "--window-size=1400,1000", address]
        opened.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    yield open_address
    for process in opened:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_the_site_in_a_browser(server, browser):
    """No page is wider than the window, no picture is missing, no code is cut off; search and themes work."""
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    pages = [page for page in pages if page not in ("search.html", "genindex.html")]
    asked = f"pages={','.join(pages)}&widths={','.join(map(str, WIDTHS))}"
    browser(f"http://127.0.0.1:{server.server_port}/drive_site.html?{asked}")
    seen = server.seen.get(timeout=240)
    assert "error" not in seen
    assert seen["faults"] == {}
    assert any("reference" in hit for hit in seen["hits"])
    assert {f"minilora.{name}" for name in minilora.__all__} <= set(seen["names"])
    assert len(set(seen["themes"])) == 3  # as the system has it, light, dark
    assert seen["copies"] > 0
