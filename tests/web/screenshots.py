"""Takes pictures of the page with a browser of this machine, to be looked at.

    python -m tests.web.screenshots FOLDER

The small shipped model makes three videos; the third is pictured while it is made. Pictures are of
a desktop and of a phone, each light and dark.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import expect

from tests.web.browsing import Watched, open_browser
from tests.web.serving import ROOT, Server

_PROMPTS = (
    "a red circle moves left on a dark blue background",
    "a blue square grows while a green triangle moves right on a black background",
)
# Tall, because cards below the screen are not drawn.
_DESKTOP = {"viewport": {"width": 1280, "height": 1500}}
_PHONE = {"viewport": {"width": 390, "height": 2600}, "device_scale_factor": 2, "is_mobile": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, open_browser() as browser:
        more = ("--num_inference_steps=25", "--preview_every=1")
        with Server(ROOT / "models/toyworld", Path(name, "videos"), *more) as server:
            for seed, prompt in enumerate(_PROMPTS):
                server.wait(server.create(prompt, seed=seed)["id"])
            running = server.create("a yellow star moves up", seed=3, num_inference_steps=500)
            server.create("a purple circle shrinks on a grey background", seed=4)
            server.wait(running["id"], "in_progress")
            for device, settings in (("desktop", _DESKTOP), ("phone", _PHONE)):
                for scheme in ("light", "dark"):
                    watched = Watched(browser, server.url, color_scheme=scheme, **settings)
                    page = watched.page
                    expect(page.locator(".preview img:not([hidden])")).to_be_visible(timeout=60_000)
                    page.locator("progress + p", has_text="left").first.wait_for()
                    page.wait_for_timeout(1500)
                    page.get_by_label("Prompt", exact=True).fill(_PROMPTS[0])
                    page.screenshot(path=folder / f"{device}_{scheme}.png")
                    wide = page.evaluate("document.documentElement.scrollWidth")
                    assert wide <= settings["viewport"]["width"], (device, wide)
                    assert not watched.errors and not watched.others
                    page.context.close()
            server.ask("DELETE", f"/v1/videos/{running['id']}")
    print(f"pictures: {folder}")


if __name__ == "__main__":
    main()
