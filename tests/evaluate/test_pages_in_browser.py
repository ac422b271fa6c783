"""Pages as people meet them: opened in a real browser, on a phone and on a desk, with data that means harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from evaluate.finetune_report import write_finetune_report
from evaluate.leaderboard_files import to_page
from evaluate.metrics import SampleScores
from evaluate.report import Example, PromptMasks, RunReport, SeveralPrompts, write_report
from tests.browser import Browser, Size
from tests.evaluate.test_finetune_report import PICTURES, STEPS, finished
from tests.evaluate.test_leaderboard import board, contenders
from tests.evaluate.test_report import IMAGE, make_results, make_run, mask
from tests.page_laws import broken_laws

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["board", "contenders", "finished"]  # fixtures of pages whose own tests make them

SIZES: tuple[Size, ...] = ("phone", "desktop")

HOSTILE = {
    "script": "<script>window.harmed = true</script>",
    "handler": '<img src=x onerror="window.harmed = true">\'"><svg onload=window.harmed=true>',
    "template": "{{ 7 * 7 }} {% raw %} ${7 * 7} &lt;b&gt; &amp; </p></section></main></body>",
    "right to left": "\u05d4\u05db\u05dc\u05d1 \u0627\u0644\u0643\u0644\u0628 \u202e reversed (dog)",
    "emoji": "the \N{DOG FACE} beside the \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} " * 3,
    "one long word": "x" * 5000,
    "many words": "word " * 1000,
    "stacked marks": "z" + "\u0351" * 300,
    "lines": "first\nsecond\r\n\tthird\u2028fourth",
    "blank": " ",
}


def rich(run: RunReport) -> RunReport:
    """The same run with everything a report can show."""
    rng = np.random.default_rng(len(run.head))
    scores = SampleScores.concatenate([run.scores] * 40)
    said = np.clip(scores.iou + rng.normal(0, 0.15, len(scores)), 0, 1)
    asked = [PromptMasks(prompt, mask(20), mask(4 * place), 0.2 * place) for place, prompt in enumerate(run.prompts)]
    return replace(
        run,
        scores=scores,
        prompts=list(run.prompts) * 40,
        tags={tag: list(values) * 40 for tag, values in run.tags.items()},
        predicted_iou=said.tolist(),
        several=[SeveralPrompts(IMAGE, asked)] * 2,
    )


def hostile(run: RunReport) -> RunReport:
    """The same run with a name, prompts and tags that mean harm."""
    prompts = list(HOSTILE.values())
    scores = SampleScores.concatenate([run.scores] * 2).take(np.arange(len(prompts)))
    return RunReport(
        head=f"{HOSTILE['handler'][:60]}_{run.head}_{'long' * 30}",
        history=run.history,
        scores=scores,
        prompts=prompts,
        tags={"kind": prompts, HOSTILE["script"]: prompts, "y" * 200: prompts},
        examples=[Example(IMAGE, mask(20), mask(8), prompt, 0.4, "best", {prompt: prompt}) for prompt in prompts],
        num_parameters=1,
        predicted_iou=[0.5] * len(prompts),
        several=[SeveralPrompts(IMAGE, [PromptMasks(prompt, mask(20), mask(8), 0.4) for prompt in prompts])],
    )


def write(path: Path, runs: list[RunReport], notes: list[str], title: str, **changes: Any) -> Path:
    results = {**make_results(runs), **changes}
    for run in results["runs"]:
        run["intervals"] = {
            name: [max(0.0, value - 0.0123), min(1.0, value + 0.0123)]
            for name, value in run["metrics"].items()
            if isinstance(value, float)
        }
    return write_report(path, results, runs, notes, title)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, finished: Path, board: dict[str, Any]) -> dict[str, Path]:
    """Each kind of page, by name."""
    folder = tmp_path_factory.mktemp("pages")
    linear, film = make_run("linear"), make_run("film", shift=6)
    names = ["cross_attention-7e58561d359e", "cross_attention-8d85ee7dd079", "film-60831409715b", "two_way", "linear"]
    found = {
        "report": write(folder / "report.html", [rich(linear), rich(film)], ["A note."], "A report"),
        "plain report": write(folder / "plain.html", [replace(linear, history=[], examples=[])], [], "One head"),
        "report of five heads": write(
            folder / "five.html", [rich(replace(film, head=name)) for name in names], ["One.", "Two."], "Five heads"
        ),
        "hostile report": write(
            folder / "hostile.html",
            [hostile(linear), hostile(film)],
            list(HOSTILE.values()),
            HOSTILE["handler"],
            seconds=dict.fromkeys(HOSTILE.values(), 1.0),
            provenance={prompt: prompt for prompt in HOSTILE.values()},
        ),
        "finetuning": write_finetune_report(finished, PICTURES, STEPS),
        "leaderboard": folder / "leaderboard.html",
    }
    found["leaderboard"].write_text(to_page(board, "A leaderboard"), encoding="utf-8")
    return found


PAGES = ("report", "plain report", "report of five heads", "hostile report", "finetuning", "leaderboard")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_breaks_no_law(browser: Browser, pages: dict[str, Path], name: str, size: Size) -> None:
    assert browser.visit(pages[name], broken_laws, size=size) == []


def test_every_page_there_is_was_looked_at(pages: dict[str, Path]) -> None:
    assert set(PAGES) == set(pages)


@pytest.mark.parametrize("size", SIZES)
def test_the_contents_lead_to_every_section(browser: Browser, pages: dict[str, Path], size: Size) -> None:
    def follow(page: Page) -> list[tuple[str, float]]:
        found = []
        for link in page.locator("nav a").all():
            link.click()
            section = str(link.get_attribute("href"))[1:]
            found.append(
                (section, page.evaluate("id => document.getElementById(id).getBoundingClientRect().top", section))
            )
        return found

    found = browser.visit(pages["report"], follow, size=size)
    height = browser.visit(pages["report"], lambda page: page.evaluate("innerHeight"), size=size)
    sections = browser.visit(
        pages["report"], lambda page: page.evaluate("[...document.querySelectorAll('section')].map(one => one.id)")
    )
    assert [section for section, _ in found] == sections
    assert len(sections) == 13
    assert all(-1 <= top < height for _, top in found), found


def test_what_is_folded_away_opens_at_a_touch(browser: Browser, pages: dict[str, Path]) -> None:
    def touch(page: Page) -> tuple[bool, bool, bool]:
        details = page.locator("#lengths details")
        table = details.locator("table")
        before = table.is_visible()
        details.locator("summary").tap()
        opened = table.is_visible()
        details.locator("summary").focus()
        page.keyboard.press("Enter")
        return before, opened, table.is_visible()

    assert browser.visit(pages["report"], touch, size="phone") == (False, True, False)


def test_a_wide_table_scrolls_in_its_own_box(browser: Browser, pages: dict[str, Path]) -> None:
    def scroll(page: Page) -> tuple[float, float, float]:
        name = page.locator("#results tbody th").first
        before = name.bounding_box()
        moved = page.evaluate(
            """() => { const box = document.querySelector("#results .scroll");
                box.scrollLeft = 200; return box.scrollLeft; }"""
        )
        after = name.bounding_box()
        assert before is not None
        assert after is not None
        return moved, after["x"] - before["x"], page.evaluate("document.documentElement.scrollLeft")

    moved, name_moved, page_moved = browser.visit(pages["report"], scroll, size="phone")
    assert moved == 200
    assert abs(name_moved) < 1, "the heads' names stay in sight"
    assert page_moved == 0


def test_a_wide_screen_shows_the_results_without_scrolling(browser: Browser, pages: dict[str, Path]) -> None:
    wider = browser.visit(
        pages["report"],
        lambda page: page.evaluate(
            """() => { const box = document.querySelector("#results .scroll");
                return box.scrollWidth - box.clientWidth; }"""
        ),
    )
    assert wider <= 0


def test_data_that_means_harm_is_only_text(browser: Browser, pages: dict[str, Path]) -> None:
    def look(page: Page) -> tuple[bool, list[str], int]:
        page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        prompts = page.evaluate("[...document.querySelectorAll('#examples .prompt')].map(one => one.textContent)")
        foreign = page.evaluate(
            "document.querySelectorAll('script, [onload], [onerror], img:not([src^=\"data:\"])').length"
        )
        return page.evaluate("'harmed' in window"), prompts, foreign

    harmed, prompts, foreign = browser.visit(pages["hostile report"], look)
    assert not harmed
    assert foreign == 0
    # A parser makes one kind of line end of three.
    expected = [f"“{prompt}”".replace("\r\n", "\n") for prompt in HOSTILE.values()]
    assert prompts == expected * 2


def test_a_very_long_prompt_takes_no_more_than_its_place(browser: Browser, pages: dict[str, Path]) -> None:
    heights = browser.visit(
        pages["hostile report"],
        lambda page: page.evaluate("[...document.querySelectorAll('.prompt')].map(one => one.offsetHeight)"),
        size="phone",
    )
    assert 0 < max(heights) <= 13.5 * 16 + 1


def test_text_from_right_to_left_turns_nothing_around_it(browser: Browser, pages: dict[str, Path]) -> None:
    """What follows a prompt on its line, or below it, is laid out from the left whatever the prompt holds."""

    def look(page: Page) -> list[tuple[str, str]]:
        found = page.evaluate(
            """() => [...document.querySelectorAll('#examples .prompt')].slice(0, 10).map(prompt =>
                [getComputedStyle(prompt).direction, getComputedStyle(prompt.nextElementSibling).direction])"""
        )
        return [tuple(pair) for pair in found]

    directions = browser.visit(pages["hostile report"], look)
    expected = ["rtl" if name == "right to left" else "ltr" for name in HOSTILE]
    assert directions == [(direction, "ltr") for direction in expected]


def test_a_printed_page_hides_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    def look(page: Page) -> tuple[int, list[str], bool]:
        hidden = """() => [...document.querySelectorAll('details table, details img')].filter(one =>
            !one.checkVisibility({ contentVisibilityAuto: true })).map(one => one.outerHTML.slice(0, 80))"""
        closed = len(page.evaluate(hidden))
        page.emulate_media(media="print")
        # A style is applied with the next picture of the page, not with the next question.
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return closed, page.evaluate(hidden), page.locator("nav").is_visible()

    closed, hidden, contents = browser.visit(pages["report"], look)
    assert closed > 0
    assert hidden == []
    assert not contents, "links to the same page are of no use on paper"


def test_pages_hold_nothing_that_runs_or_is_fetched(browser: Browser, pages: dict[str, Path]) -> None:
    foreign = "script, link:not([href^='data:']), iframe, object, embed, base, img:not([src^='data:'])"
    for path in pages.values():
        assert browser.visit(path, lambda page: page.locator(foreign).count()) == 0
