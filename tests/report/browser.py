"""Pages laid out by a real browser: what of them leaves its room, and how well their colours stand out."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")

# Every page in a frame of each width: a window of a browser cannot be as narrow as a telephone.
_HARNESS = """<!doctype html><meta charset="utf-8"><body>%s<script>
const NEAR = 1.0;
function luminance(colour) {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}
function inside(box, room) {
  return box.left >= room.left - NEAR && box.right <= room.right + NEAR
    && box.top >= room.top - NEAR && box.bottom <= room.bottom + NEAR;
}
function meet(a, b) {
  return a.left < b.right - NEAR && b.left < a.right - NEAR && a.top < b.bottom - NEAR && b.top < a.bottom - NEAR;
}
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, faults = [];
  page.querySelectorAll("details").forEach(each => { each.open = true; });
  const width = page.documentElement.clientWidth;
  const needed = page.documentElement.scrollWidth;
  if (needed > width) faults.push(`the page scrolls sideways: ${needed}`);
  for (const each of page.body.querySelectorAll("*")) {
    if (each.closest("svg") !== each && each.closest("svg")) continue;
    const scrolled = each.closest(".scroll");
    if (scrolled && scrolled !== each) continue;
    const box = each.getBoundingClientRect();
    if (box.right > width + NEAR || box.left < -NEAR)
      faults.push(`${each.tagName} ${each.className} from ${box.left} to ${box.right}`);
  }
  const ground = view.getComputedStyle(page.body).backgroundColor;
  let faintest = 21, smallest = 99;
  for (const svg of page.querySelectorAll("svg")) {
    const room = svg.getBoundingClientRect(), words = [...svg.querySelectorAll("text")];
    const boxes = words.map(word => word.getBoundingClientRect());
    words.forEach((word, i) => {
      if (!inside(boxes[i], room)) faults.push(`"${word.textContent}" overlaps the edge of its chart`);
      boxes.forEach((other, j) => {
        if (j < i && meet(boxes[i], other)) faults.push(`"${word.textContent}" on "${words[j].textContent}"`);
      });
      const drawn = room.width / svg.viewBox.baseVal.width;
      smallest = Math.min(smallest, parseFloat(view.getComputedStyle(word).fontSize) * drawn);
    });
    for (const shape of svg.querySelectorAll(".dot, .line, .ring")) {
      const style = view.getComputedStyle(shape);
      faintest = Math.min(faintest, contrast(shape.matches(".dot") ? style.fill : style.stroke, ground));
    }
  }
  const text = contrast(view.getComputedStyle(page.body).color, ground);
  const charts = page.querySelectorAll("svg").length;
  return {width, faults, charts, faintest, smallest, text, ground: luminance(ground)};
}
window.onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  const said = document.createElement("pre");
  said.id = "found";
  said.textContent = JSON.stringify(found);
  document.body.append(said);
};
</script>"""


def chromium():
    """The path of a browser; skips where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium here to lay the page out: none of {', '.join(NAMES)} is on PATH")
    return found


def look(pages, widths, folder, dark=False):
    """Facts of every page at every width, in that order: faults as texts, contrasts, how small text gets."""
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(page)}"></iframe>'
        for page in pages
        for width in widths
    )
    harness = folder / "harness.html"
    harness.write_text(_HARNESS % frames)
    scheme = ["--blink-settings=preferredColorScheme=0", "--force-dark-mode"] if dark else []
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, *scheme, "--dump-dom", harness.as_uri()], capture_output=True, text=True, timeout=300
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the browser said nothing of the page: {done.stderr[-500:]}"
    return json.loads(unescape(found[1]))
