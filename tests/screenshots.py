"""Takes the pictures of the page that the README shows: `make screenshots`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.browser import chromium, window
from tests.gallery import on_show

DOCS = Path(__file__).resolve().parent.parent / "docs"
RED_RUN = "vouchers"  # the branch of the run whose page is shown
PICTURES = {  # path, size and scheme, by file
    "page.png": ("/", "desktop", "light"),
    "page-app.png": ("/apps/shop", "desktop", "dark"),
    "page-run.png": ("", "desktop", "light"),
    "page-phone.png": ("/", "phone", "dark"),
}


def main() -> None:
    """Write every picture."""
    with tempfile.TemporaryDirectory() as folder, on_show(Path(folder)) as (gallery, served):
        runs = gallery.context.observed_runs(gallery.states())
        red = next(seen.run.id for seen in runs if seen.run.branch == RED_RUN)
        with chromium() as browser:
            for name, (path, size, scheme) in PICTURES.items():
                with window(browser, size, scheme) as page:
                    page.goto(f"{served.url}{path or f'/runs/{red}'}")
                    page.screenshot(path=DOCS / name)
                print(f"{DOCS / name}: {(DOCS / name).stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
