from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from cache_schema.errors import UsageError
from evaluate.metrics import SampleScores, compute, score_mask
from evaluate.protocols import PROTOCOLS, Protocol
from evaluate.report import HEADLINE_METRICS, Example, PromptMasks, RunReport, SeveralPrompts, write_report
from evaluate.report_plots import Line, draw_curves

NASTY = """<script>alert("&")</script> 'https://example.org/x.png'"""
IMAGE = np.full((30, 40, 3), 120, np.uint8)


def mask(width):
    mask = np.zeros((30, 40), np.bool_)
    mask[5:25, :width] = True
    return mask


def make_run(head, shift=0):
    truths, widths = [mask(20)] * 5 + [mask(0)], [4, 8, 12, 16, 20 - shift, shift]
    scores = SampleScores.concatenate(
        [score_mask(mask(width), truth, no_target=not truth.any()) for width, truth in zip(widths, truths, strict=True)]
    )
    prompts = ["dog", "the dog", "the dog on the left", NASTY, "a red dog here", "unicorn"]
    examples = [
        Example(IMAGE, mask(20), mask(4 * number), prompt, 0.2 * number, group, {"kind": "attribute", "other": None})
        for number, (group, prompt) in enumerate(
            [("worst", "last"), ("best", NASTY), ("median", "mid"), ("best", "two")]
        )
    ]
    history = [
        {"step": step, "epoch": 0, "train_loss": 1 / (1 + step) if step else None, "val_mean_iou": step / 100}
        | {"val_overall_iou": 0.1, "learning_rate": 1e-3, "elapsed_s": step * 1.5}
        for step in range(0, 50, 10)
    ]
    tags = {"kind": ["attribute", "attribute", "relation", "relation", None, "no target"]}
    return RunReport(head, history, scores, prompts, tags, examples, 1_234_567)


def make_results(runs):
    return {
        "runs": [
            {"head": run.head, "run_dir": f"runs/{run.head}-1", "metrics": compute((run.scores,)), "slices": {}}
            for run in runs
        ],
        "baselines": {"all_empty": {"mean_iou": 0.0123, "n_acc": None}, "centre_prior": {"mean_iou": 0.0456}},
        "protocol": Protocol().to_dict(),
        "seconds": {"extract": {"images": 12.34}, "train": 60.0},
        "provenance": {"stores": {"images": "f" * 64}},
    }


RUNS = [make_run("linear"), make_run("film", shift=6)]


def write(
    tmp_path, runs=RUNS, notes=("The encoders are untrained.",), title="A title", runs_of_results=None, **changes
):
    results = {**make_results(runs), **changes}
    results["runs"] = runs_of_results or results["runs"]
    return write_report(tmp_path / "report.html", results, runs, notes, title).read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.rows, self.in_cell = [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_fetches_nothing(html, page):
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\((?!#)", html)
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in page.of("meta"))


def test_a_prompt_is_text_and_never_markup(html, page):
    assert NASTY not in html
    assert NASTY in page.text


def test_title_notes_and_names_are_escaped_too(tmp_path):
    run = replace(RUNS[0], head="<i>$head$", tags={"<u>tag": ["<u>value"] * 6})
    html = write(tmp_path, [run], notes=["<em>note", "two"], title="<b>title", seconds={"<s>stage": 1.0})
    for markup in ("<i>$", "<u>", "<em>", "<b>title", "<s>stage"):
        assert markup not in html
    assert "<i>$head$" in Page(html).text


def test_all_sections_are_there_and_the_contents_lead_to_them(page):
    sections = [attrs["id"] for attrs in page.of("section")]
    assert sections == [
        "results", "protocol", "slices", "lengths", "training", "histograms", "comparison", "examples", "time",
        "provenance", "glossary",
    ]  # fmt: skip
    links = {attrs["href"] for attrs in page.of("a")}
    assert links == {f"#{section}" for section in sections}


def test_the_page_says_what_was_found_and_what_to_know(page):
    assert "linear reaches a mean IoU of 0.667, the best of the heads" in page.text
    assert "the best baseline, “centre prior”, reaches 0.046" in page.text
    assert "The encoders are untrained." in page.text


def test_heads_that_do_not_beat_a_baseline_are_said_not_to(tmp_path):
    html = write(tmp_path, baselines={"all_empty": {"mean_iou": 0.9}})
    assert "That is no better than the baseline “all empty” at 0.900." in html


def test_the_headline_table_has_heads_then_baselines(page):
    rows = page.rows[1:6]
    del rows[2]  # the name of the group
    assert [row[0] for row in rows] == ["linear", "film", "all empty", "centre prior"]
    assert rows[0][1] == "0.667"
    assert rows[0][-2:] == ["1.23 M", "60.0"]
    assert rows[2][1:3] == ["0.012", "\N{EN DASH}"]


def test_the_best_head_is_bold_and_equal_heads_are_not(html):
    bold = re.findall(r"<b>([^<]+)</b>", html)
    ours, other = (compute((run.scores,)) for run in RUNS)
    assert ours["n_acc"] > other["n_acc"]
    assert ours["t_acc"] == other["t_acc"]
    assert bold == [f"{ours[name]:.3f}" for name in HEADLINE_METRICS if ours[name] > other[name]]


def test_the_protocol_is_told_in_words(page):
    assert "Masks are compared at the original size of each image." in page.text
    assert "A pixel is marked where its probability is > 0.5." in page.text
    assert "An empty prediction of an empty truth counts as IoU 1." in page.text
    assert "says “no target” below 50 marked pixels" in page.text


def test_another_resolution_is_named(tmp_path):
    html = write(tmp_path, protocol=Protocol(resolution="352x352").to_dict())
    assert "Masks are compared at 352x352, not at the original size" in html


def test_slices_show_samples_and_one_number_for_each_head(page):
    assert ["attribute", "2", "0.300", "0.300"] in page.rows
    assert ["no target", "1", "1.000", "0.000"] in page.rows
    assert {"1-2", "3-4", "5-7", "none", "small"} <= {row[0] for row in page.rows}


def test_a_tag_with_many_values_shows_the_most_frequent(tmp_path):
    run = make_run("linear")
    scores = SampleScores.concatenate([run.scores] * 10)
    many = replace(
        run, scores=scores, prompts=run.prompts * 10, tags={"category": [f"c{n % 30:02}" for n in range(59)] + ["c00"]}
    )
    page = Page(write(tmp_path, [many]))
    shown = [row[0] for row in page.rows if re.fullmatch(r"c\d\d", row[0])]
    assert shown == sorted(shown)
    assert len(shown) == 24
    assert "6 more are in results.json" in page.text


def test_a_very_long_value_of_a_tag_is_cut(tmp_path):
    page = Page(write(tmp_path, [replace(RUNS[0], tags={"kind": ["x" * 5000] * 6})]))
    assert max(len(cell) for row in page.rows for cell in row) <= 120
    assert ["x" * 119 + "…", "6"] in [row[:2] for row in page.rows]


def test_examples_come_best_median_worst_and_in_the_order_given(page):
    first = page.text[page.text.index("Examples The image") :]
    places = [first.index(text) for text in ("Best", NASTY, "“two”", "Around the median", "“mid”", "Worst", "“last”")]
    assert places == sorted(places)


def test_only_what_is_long_and_of_the_first_head_is_open(html):
    examples = html[html.index('<section id="examples">') :]
    assert re.findall(r"<details[^>]*>", examples) == ["<details open>", "<details>"]
    words = html[html.index('<section id="lengths">') : html.index('<section id="training">')]
    assert re.findall(r"<details[^>]*>", words) == ["<details>"]


def test_every_picture_has_a_size_and_says_what_it_shows(page):
    images = page.of("img")
    assert len(images) == 2 * 4 * 3
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    assert "Prediction: nothing is marked" in {image["alt"] for image in images}
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))


def test_every_header_cell_says_what_it_heads(page):
    assert {attrs.get("scope") for attrs in page.of("th")} == {"col", "row", "rowgroup"}


def test_ids_are_unique_and_every_reference_has_its_target(html, page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert {attrs["xlink:href"][1:] for attrs in page.of("use")} <= set(ids)


def test_intervals_stand_below_the_numbers_they_belong_to(tmp_path, page):
    runs = make_results(RUNS)["runs"]
    runs[0]["intervals"] = {"mean_iou": [0.61, 0.7251], "p_at_0.5": [0, 1.0], "dice": [None, None]}
    shown = Page(write(tmp_path, runs_of_results=runs))
    plain, row = page.rows[1], shown.rows[1]
    assert row[1] == f"{plain[1]}.610\N{EN DASH}.725"
    assert row[3] == f"{plain[3]}.000\N{EN DASH}1.000"
    assert row[2] == plain[2], "no interval was given"
    assert row[6] == plain[6], "one without ends is none"
    assert shown.rows[2] == page.rows[2], "the other head has none"
    assert "Below each number stands its interval" in shown.text
    assert "Below each number" not in page.text


def test_how_intervals_were_made_is_told(tmp_path):
    runs = [{**run, "intervals": {"mean_iou": [0.5, 0.6]}} for run in make_results(RUNS)["runs"]]
    bootstrap = {"level": 0.9, "num_replicates": 1000, "num_images": 24, "seed": 0}
    text = Page(write(tmp_path, runs_of_results=runs, bootstrap=bootstrap)).text
    assert "stands its 90 % interval, from 1,000 bootstrap replicates over 24 images" in text


def test_the_metrics_a_protocol_shows_first_come_first_and_decide(tmp_path, page):
    assert page.rows[0][1:7] == ["Mean IoU", "Overall IoU", "P@0.5", "P@0.7", "P@0.9", "Dice"]
    gref = Page(write(tmp_path, protocol=PROTOCOLS["gref"].to_dict(), baselines={}))
    assert gref.rows[0][1:5] == ["gIoU", "cIoU", "N-acc", "T-acc"]
    assert "Mean IoU" in gref.rows[0]
    best = max(compute((run.scores,))["giou"] for run in RUNS)
    assert f"reaches a gIoU of {best:.3f}" in gref.text


def test_how_masks_are_resized_is_told_with_the_resolution(tmp_path):
    text = Page(write(tmp_path, protocol=PROTOCOLS["resized-480"].to_dict())).text
    assert "Masks are compared at 480x480, not at the original size" in text
    assert f"How the truth is resized: {PROTOCOLS['resized-480'].truth_resize}." in text


def test_the_number_of_words_has_its_own_means(page):
    iou = RUNS[0].scores.iou
    assert ["1", "2", f"{(iou[0] + iou[5]) / 2:.3f}", f"{RUNS[1].scores.iou[[0, 5]].mean():.3f}"] in page.rows
    assert ["4", "1", f"{iou[4]:.3f}", f"{RUNS[1].scores.iou[4]:.3f}"] in page.rows


def test_only_heads_that_predict_their_iou_are_calibrated(tmp_path, page):
    assert "calibration" not in {attrs["id"] for attrs in page.of("section")}
    said = [0.2, 0.4, 0.6, 0.8, 1.2, float("nan")]
    shown = Page(write(tmp_path, [RUNS[0], replace(RUNS[1], predicted_iou=said)]))
    assert "calibration" in {attrs["id"] for attrs in shown.of("section")}
    (row,) = [row for row in shown.rows if len(row) == 6 and row[0] in ("linear", "film")]
    achieved = RUNS[1].scores.iou[:5]
    assert row[:3] == ["film", "0.600", f"{achieved.mean():.3f}"]
    assert float(row[4]) == pytest.approx(np.corrcoef([0.2, 0.4, 0.6, 0.8, 1], achieved)[0, 1], abs=0.006)
    assert "1 predictions are no finite numbers" in shown.text


def test_as_many_predicted_ious_are_wanted_as_samples(tmp_path):
    with pytest.raises(ValueError, match="2 predicted IoUs for 6 samples"):
        write(tmp_path, [replace(RUNS[0], predicted_iou=[0.1, 0.2])])


def test_the_best_head_stands_against_the_others_sample_by_sample(page):
    best, other = (run.scores.iou for run in RUNS)
    shares = [np.mean(best > other), np.mean(best == other), np.mean(best < other)]
    assert ["film", f"{np.mean(best - other):+.3f}", *(f"{share:.1%}" for share in shares)] in page.rows
    no_target = best[5] - other[5]
    assert ["no target", "1", f"{no_target:+.3f}"] in page.rows
    assert ["attribute", "2", "0.000"] in page.rows, "equal heads differ by nothing, without a sign"


def test_the_best_head_is_the_one_compared_wherever_it_stands(tmp_path):
    page = Page(write(tmp_path, RUNS[::-1]))
    assert "linear has the highest mean IoU" in page.text
    assert [row[0] for row in page.rows if len(row) == 5 and row[-1].endswith("%") and row[0] != "Against"] == ["film"]


def test_one_head_is_compared_with_nothing(tmp_path):
    assert "comparison" not in {attrs["id"] for attrs in Page(write(tmp_path, RUNS[:1])).of("section")}


def test_heads_scored_on_other_samples_are_refused(tmp_path):
    with pytest.raises(UsageError, match="not scored on the same samples"):
        write(tmp_path, [RUNS[0], replace(RUNS[1], prompts=[*RUNS[1].prompts[:5], "another"])])


def test_several_prompts_of_an_image_stand_beside_it(tmp_path, page):
    assert "several" not in {attrs["id"] for attrs in page.of("section")}
    asked = [PromptMasks(prompt, mask(20), mask(width), 0.5) for prompt, width in (("first", 3), (NASTY, 9))]
    html = write(tmp_path, [replace(RUNS[0], several=[SeveralPrompts(IMAGE, asked)]), RUNS[1]])
    shown = Page(html[html.index('<section id="several">') : html.index('<section id="time">')])
    assert shown.text.index("“first”") < shown.text.index(f"“{NASTY}”")
    assert len(shown.of("img")) == 1 + 2 * 2
    assert len(shown.of("details")) == 1, "the other head has no such image"
    assert NASTY not in html


def test_stages_and_provenance_are_listed(page):
    assert ["extract · images", "12.3"] in page.rows
    assert ["Run of film", "runs/film-1"] in page.rows
    assert ["stores · images", "f" * 64] in page.rows


def test_a_page_written_twice_is_the_same_to_the_byte(tmp_path, html):
    assert write(tmp_path / "new" / "folder") == html


def test_a_page_with_many_large_pictures_stays_light(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    truth = np.zeros((480, 640), np.bool_)
    example = Example(noise, truth, truth, "noise", 1.0, "best", {})
    write(tmp_path, [replace(RUNS[0], examples=[example] * 20)])
    assert (tmp_path / "report.html").stat().st_size < 4_000_000


def noisy_runs(num, num_examples, num_several):
    """Heads whose pictures hardly shrink as JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    truth = np.zeros((96, 96), np.bool_)
    examples = [
        Example(noise, truth, truth, f"{group} {place}", 0.5, group, {})
        for group in ("best", "median", "worst")
        for place in range(num_examples)
    ]
    several = [SeveralPrompts(noise, [PromptMasks("asked", truth, truth, 0.5)] * 4)] * num_several
    return [replace(RUNS[0], head=f"head {place}", examples=examples, several=several) for place in range(num)]


@pytest.mark.parametrize(
    ("num_heads", "num_several", "left_out", "num_examples", "several_shown"),
    [
        (2, 1, [], 4, True),
        (12, 0, ["examples: 2"], 2, False),
        (30, 3, ["examples: 1", "several"], 1, False),
        (60, 3, ["examples: 1", "several", "heads"], 1, False),
    ],
)
def test_a_page_of_many_heads_shows_fewer_pictures_and_says_so(
    tmp_path, num_heads, num_several, left_out, num_examples, several_shown
):
    html = write(tmp_path, noisy_runs(num_heads, 4, num_several))
    page = Page(html)
    assert sum(map(len, re.findall(r'src="(data:image/[^"]*)"', html))) <= 3_000_000
    assert ('<section id="several">' in html) == several_shown
    said = re.search(r"To stay light, this page leaves out (.*?)\. Fewer runs show more\.", page.text)
    parts = said[1].split("; ") if said else []
    num_shown = num_heads
    if parts and parts[-1].startswith("pictures of heads"):
        num_shown = int(re.search(rf"after the first (\d+) of {num_heads}$", parts[-1])[1])
        assert 30 < num_shown < num_heads
    expected = {
        "examples: 2": "more than 2 of the best, median and worst examples of a head",
        "examples: 1": "more than 1 of the best, median and worst examples of a head",
        "several": "images with several prompts",
        "heads": f"pictures of heads after the first {num_shown} of {num_heads}",
    }
    assert parts == [expected[name] for name in left_out]
    examples = html[html.index('<section id="examples">') :].split("</section>")[0]
    assert examples.count("<img ") == num_shown * 3 * 3 * num_examples
    assert any(row[:1] == [f"head {num_heads - 1}"] for row in page.rows), "its numbers are there all the same"


def test_a_run_without_history_or_examples_is_still_shown(tmp_path):
    page = Page(write(tmp_path, [replace(RUNS[0], history=[], examples=[])], notes=[], seconds={}, baselines={}))
    assert "No validation was recorded" in page.text
    assert "No example was kept" in page.text


def test_results_of_other_heads_are_refused(tmp_path):
    with pytest.raises(UsageError, match="evaluate these runs again"):
        write_report(tmp_path / "report.html", make_results(RUNS), RUNS[:1], [], "title")
    assert not list(tmp_path.iterdir())


def test_a_report_on_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="train a head first"):
        write(tmp_path, [])


def test_labels_of_curves_that_end_together_do_not_overlap():
    lines = [Line(f"head {number}", [0, 1], [0.1, 0.5]) for number in range(6)]
    svg = draw_curves("plot", lines, "Six equal curves", from_zero=True)
    heights = [float(height) for height in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>head \d', svg)]
    assert len(heights) == 6
    assert np.diff(sorted(heights)).min() > 10


def test_a_single_validation_can_be_drawn():
    assert "head" in draw_curves("plot", [Line("head", [5], [0.25])], "One point", from_zero=False)
