"""A headless Chromium on this machine, driven by its own command line: no package and no download.

What a page has become after its layout is asked of a second page that shows the first in a frame of a given width and
writes what it measures into its own text, as a headless window itself is never narrower than 500 pixels.
"""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre><script>
addEventListener("message", event => {{ document.getElementById("found").textContent = event.data }});
</script><iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>"""

MEASURE = """<script>
addEventListener("load", () => {
  const page = document.documentElement, style = getComputedStyle(document.body);
  const wide = [...document.querySelectorAll("body *")].filter(each =>
    !each.closest(".scroll, svg, details:not([open])") && each.getBoundingClientRect().right > page.clientWidth + 1);
  parent.postMessage(JSON.stringify({
    width: page.clientWidth, content: page.scrollWidth, background: style.backgroundColor, colour: style.color,
    wide: wide.map(each => each.outerHTML.slice(0, 120)),
    bars: [...document.querySelectorAll("rect.grafted")].map(each => each.getBoundingClientRect().width),
    dots: [...document.querySelectorAll(".row circle")].map(each => each.getBoundingClientRect().x),
  }), "*");
});
</script>"""


def chromium():
    """Where Chromium is, or None. `KERNELGRAFT_CHROMIUM` may name it."""
    return os.environ.get("KERNELGRAFT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def run(folder, address, *options):
    """What Chromium writes for one page, and all that it says of it, with a profile of its own."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder / 'profile'}", "--disable-dev-shm-usage", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def measured(folder, text, width=1000, dark=False):
    """What a page looks like in a frame of this width, in light or dark."""
    page = folder / "probe.html"
    # The page's own policy allows no script, and the measuring one must run.
    opened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace(
        "</body>", MEASURE + "</body>"
    )
    page.write_text(PROBE.format(width=width, page=opened.replace("&", "&amp;").replace('"', "&quot;")))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = run(folder, Path(page).as_uri(), scheme, "--virtual-time-budget=3000", "--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1]))
