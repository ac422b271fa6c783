"""What every page of ours keeps, looked at in a browser: nothing is lost on a phone, to weak eyes, to a screen reader.

Everything that is folded away is opened first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

LEAST_TEXT_PX, LEAST_CONTRAST = 10.5, 4.5

_LOOK = """
([leastTextPx, leastContrast]) => {
  const broken = [];
  const complain = (law, element, more = "") => {
    const text = (element.textContent || element.getAttribute("alt") || "").trim().replace(/\\s+/g, " ").slice(0, 40);
    broken.push(`${law}: <${element.tagName.toLowerCase()} ${element.getAttribute("class") || ""}> "${text}" ${more}`);
  };
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  const shown = element => element.checkVisibility({ visibilityProperty: true });

  // Layout
  // A phone shows a page smaller until all of it fits: its window then seems to be wider than its screen.
  const width = screen.width;
  if (window.innerWidth > width) broken.push(`the page is laid out for a screen of ${window.innerWidth} px`);
  const root = document.documentElement;
  if (root.scrollWidth > width) complain("the page scrolls sideways", root, `${root.scrollWidth} > ${width}`);
  const inBox = element => {
    for (let box = element; box && box !== document.body; box = box.parentElement)
      if (getComputedStyle(box).overflowX !== "visible" && box.tagName !== "svg") return true;
    return false;
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (element.ownerSVGElement || !shown(element)) continue;
    const box = element.getBoundingClientRect();
    if ((box.right > width + 1 || box.left < -1) && !inBox(element)) complain("it leaves the page", element);
    const style = getComputedStyle(element);
    if (element.scrollWidth > element.clientWidth + 1 && ["auto", "scroll"].includes(style.overflowX) &&
        element.tabIndex < 0) complain("it scrolls sideways and a keyboard cannot reach it", element);
    if (["hidden", "clip"].includes(style.overflowX) && element.scrollWidth > element.clientWidth + 1 &&
        element.tagName !== "svg") complain("it is cut off", element);
  }

  // Text
  const channel = value => value <= 10.31475 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const colour = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const backdrop = element => {
    for (let box = element; box; box = box.parentElement) {
      const found = colour(getComputedStyle(box).backgroundColor);
      if (found.a === 1) return found.rgb;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || /^(style|script|title)$/i.test(element.tagName) || !shown(element)) continue;
    const style = getComputedStyle(element), svg = element.ownerSVGElement;
    const size = parseFloat(style.fontSize) * (svg ? svg.getScreenCTM().a : 1);
    if (size < leastTextPx) complain("text is tiny", element, `${size.toFixed(1)} px`);
    const ink = luminance(colour(svg ? style.fill : style.color).rgb), paper = luminance(backdrop(svg || element));
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < leastContrast) complain("text is pale", element, contrast.toFixed(2));
  }

  // Pictures
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) complain("a picture did not load", image);
    if (!image.alt) complain("a picture says nothing", image);
    const box = image.getBoundingClientRect();
    if (shown(image) && (box.width < 24 || box.height < 4)) complain("a picture is tiny", image, `${box.width} px`);
  }
  for (const svg of document.querySelectorAll("svg")) {
    if (svg.getAttribute("role") !== "img" || !svg.getAttribute("aria-label")) complain("a plot says nothing", svg);
    if (!shown(svg)) continue;
    const frame = svg.getBoundingClientRect(), boxes = [];
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 ||
          box.top < frame.top - 1 || box.bottom > frame.bottom + 1) complain("text leaves its plot", text);
      // Letters do not fill the height of their boxes.
      const slack = 0.2 * Math.min(box.width, box.height);
      for (const [other, taken] of boxes)
        if (Math.min(box.right, taken.right) - Math.max(box.left, taken.left) > slack &&
            Math.min(box.bottom, taken.bottom) - Math.max(box.top, taken.top) > slack)
          complain("text lies on text", text, `"${other}"`);
      boxes.push([text.textContent, box]);
    }
  }

  // Structure
  const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(heading => Number(heading.tagName[1]));
  if (levels.lastIndexOf(1) !== 0) broken.push("there is not one first heading");
  levels.slice(1).forEach((level, place) => {
    if (level > levels[place] + 1) broken.push(`a heading of level ${level} follows one of level ${levels[place]}`);
  });
  if (!document.documentElement.lang) broken.push("the page has no language");
  if (!document.title) broken.push("the page has no title");
  for (const table of document.querySelectorAll("table")) {
    if (!table.tHead) complain("a table has no header row", table);
    for (const cell of table.querySelectorAll("th")) if (!cell.scope) complain("a header cell heads nothing", cell);
  }
  const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
  if (new Set(ids).size !== ids.length) broken.push("two elements have one id");
  for (const link of document.querySelectorAll("a[href^='#']"))
    if (!document.getElementById(decodeURIComponent(link.hash.slice(1)))) complain("a link leads nowhere", link);
  for (const region of document.querySelectorAll("[role=region]"))
    if (!region.getAttribute("aria-label")) complain("a region has no name", region);
  return broken;
}
"""


def broken_laws(page: Page) -> list[str]:
    """What the page breaks at the size of its window, in words; nothing if all is well."""
    found: list[str] = page.evaluate(_LOOK, [LEAST_TEXT_PX, LEAST_CONTRAST])
    return found
