"""The leaderboard: every number recomputed from the runs, costs against hand counts, and files that hold what they say.

Nothing is timed: of timings it is only asked that they are there.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.evaluation import evaluate_run
from evaluate.head_cost import cost_inputs, count_flops, count_peak_bytes
from evaluate.leaderboard import Contender, Spread, make_leaderboard
from evaluate.leaderboard_files import CSV, JSON, MARKDOWN, PAGE, finding, tables, to_csv, to_markdown, to_page
from evaluate.leaderboard_files import write_leaderboard as write
from evaluate.leaderboard_plot import Point, draw_tradeoff, tradeoff_figure
from heads.bilstm import BiLSTM
from heads.checkpoint import load_head
from heads.inputs import HeadInputs
from heads.train_config import TrainConfig
from headstart import api

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def contenders(workspace: Path, feature_cache: FeatureCache) -> list[Contender]:
    """Two heads with two seeds each, two epochs."""
    configs = [
        TrainConfig("linear", epochs=2, batch_size=16, target_size=(16, 24)),
        TrainConfig(
            "film", {"dim": 8, "num_heads": 2}, learning_rate=1e-6, epochs=2, batch_size=16, target_size=(8, 12)
        ),
    ]
    found: list[list[Path]] = [[], []]
    for seed in SEEDS:
        seeded = [replace(config, seed=seed) for config in configs]
        for place, run in enumerate(api.train_heads(seeded, feature_cache, workspace / "bench", trackers=())):
            found[place].append(run.run_dir)
    return [Contender("a line", found[0]), Contender("a film", found[1])]


@pytest.fixture(scope="module")
def board(contenders: list[Contender], feature_cache: FeatureCache) -> dict[str, Any]:
    return make_leaderboard(
        contenders, feature_cache, split="test", left_out={"juras": "it is <too> large"}, notes=["a note"]
    )


def entry_of(board: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [entry for entry in board["heads"] if entry["name"] == name]
    return dict(found)


def test_every_score_is_the_mean_over_the_runs_with_its_spread(
    board: dict[str, Any], contenders: list[Contender], feature_cache: FeatureCache
) -> None:
    kinds = np.array(feature_cache.samples.samples.tags["kind"], dtype=object)
    for contender in contenders:
        entry = entry_of(board, contender.name)
        evaluations = [evaluate_run(run_dir, feature_cache, "test") for run_dir in contender.run_dirs]
        expected = {
            "mean_iou": [float(np.mean(one.scores.iou)) for one in evaluations],
            "overall_iou": [float(one.scores.intersection_px.sum() / one.scores.union_px.sum()) for one in evaluations],
            "p_at_0.5": [float(np.mean(one.scores.iou >= 0.5)) for one in evaluations],
        }
        assert entry["metrics"].keys() == expected.keys()
        for name, values in expected.items():
            spread = entry["metrics"][name]
            assert spread["values"] == pytest.approx(values)
            assert spread["mean"] == pytest.approx(statistics.mean(values))
            assert spread["sd"] == pytest.approx(statistics.stdev(values))
            assert (spread["low"], spread["high"]) == pytest.approx((min(values), max(values)))
        of_samples = kinds[evaluations[0].samples]
        assert entry["slices"].keys() == set(of_samples)
        for kind, found in entry["slices"].items():
            values = [float(np.mean(one.scores.iou[of_samples == kind])) for one in evaluations]
            assert found["mean"] == pytest.approx(statistics.mean(values))
            assert found["num_samples"] == np.count_nonzero(of_samples == kind)
    assert all(entry["metrics"]["mean_iou"]["sd"] > 0 for entry in board["heads"]), "the seeds differ"


def test_heads_stand_by_mean_iou_whatever_the_order_they_are_given_in(
    board: dict[str, Any], contenders: list[Contender], feature_cache: FeatureCache
) -> None:
    means = [entry["metrics"]["mean_iou"]["mean"] for entry in board["heads"]]
    assert means == sorted(means, reverse=True)
    turned = make_leaderboard(contenders[::-1], feature_cache, split="test")
    assert [entry["name"] for entry in turned["heads"]] == [entry["name"] for entry in board["heads"]]


def test_the_cost_is_that_of_the_head_and_of_its_own_steps(
    board: dict[str, Any], contenders: list[Contender], feature_cache: FeatureCache
) -> None:
    num_train = len(feature_cache.usable_samples("train"))
    for contender in contenders:
        cost, num, seconds = entry_of(board, contender.name)["cost"], 0, 0.0
        _, head = load_head(contender.run_dirs[0] / "best")
        assert cost["num_parameters"] == sum(parameter.numel() for parameter in head.parameters())
        for run_dir in contender.run_dirs:
            for line in (run_dir / "metrics.jsonl").read_text().splitlines():
                num, seconds = num + num_train, seconds + json.loads(line)["train_s"]
        assert cost["train_samples_per_s"] == pytest.approx(num / seconds)
        assert cost["batch_size"] == 64
        assert min(cost["latency_ms"], cost["prompts_per_s"], cost["peak_bytes"], cost["flops_per_prompt"]) > 0
        assert cost["peak_measured"] in ("tensors counted", "torch.cuda.max_memory_allocated")


def test_cost_is_measured_with_one_prompt_and_with_an_image_for_each_of_many(
    contenders: list[Contender], feature_cache: FeatureCache
) -> None:
    _, head = load_head(contenders[0].run_dirs[0] / "best")
    one, many = cost_inputs(head, feature_cache, "train", 64)
    grid = one.features["last"].shape[1:]
    assert one.features["last"].shape == (1, *grid)
    assert one.prompt_mask.all(), "padding is paid for by a batch, not by one prompt"
    assert many.features["last"].shape == (64, *grid)
    assert many.image_index.tolist() == list(range(64))
    num_images = len({*feature_cache.samples.samples.image_rows[feature_cache.usable_samples("train")].tolist()})
    assert num_images < 64
    assert torch.equal(many.features["last"][0], many.features["last"][num_images]), "a small split repeats"
    assert not torch.equal(many.features["last"][0], many.features["last"][1])
    lengths = many.prompt_mask[:num_images].sum(1).tolist()
    assert one.prompt_mask.shape[1] == statistics.median_low(lengths)
    with torch.no_grad():
        assert torch.isfinite(head(one).mask_logits).all()


class OnPooled(nn.Module):
    """A stand-in for a head: one module on pooled features as a sequence of one prompt."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: HeadInputs) -> Any:
        return self.inner(inputs.prompt_tokens)


def inputs_of(num_tokens: int, width: int) -> HeadInputs:
    return HeadInputs(
        features={},
        cls={},
        prompt_tokens=torch.ones(1, num_tokens, width),
        prompt_mask=torch.ones(1, num_tokens, dtype=torch.bool),
        pooled=torch.ones(1, width),
        image_index=torch.zeros(1, dtype=torch.long),
    )


class Attention(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        heads = tokens[:, None]  # torch has a fused kernel for four dimensions alone
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        attended: Tensor = self.attention(tokens, tokens, tokens)[0]
        return attended


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = BiLSTM(width=8, hidden_dim=5, num_layers=1)

    def forward(self, tokens: Tensor) -> Tensor:
        read: Tensor = self.lstm(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
        return read


@pytest.mark.parametrize(
    ("module", "flops"),
    [
        (nn.Linear(8, 5), 2 * 6 * 8 * 5),
        (Attention(), 2 * (2 * 6 * 6 * 8)),
        (Encoder(), 2 * 4 * 6 * 8 * 8 + 2 * (2 * 6 * 6 * 8)),
        (nn.LSTM(8, 5, batch_first=True), 2 * 6 * 4 * 5 * (8 + 5)),
        (BothWays(), 2 * (2 * 6 * 4 * 5 * (8 + 5))),
    ],
    ids=["linear", "attention", "multi-head", "lstm", "bilstm"],
)
def test_operations_of_fused_kernels_count_too(module: nn.Module, flops: int) -> None:
    head = OnPooled(module).eval()
    assert count_flops(head, inputs_of(6, 8)) == flops
    assert torch.backends.mkldnn.enabled
    assert torch.backends.mha.get_fastpath_enabled()


class Steps(nn.Module):
    """Makes two arrays of 400 bytes that live together, and a third after one of them is gone."""

    def forward(self, inputs: HeadInputs) -> Tensor:
        first = inputs.pooled + 1
        second = first.view(10, 10) * 2
        del first
        return second.sum(0) + inputs.pooled[0, :10]


def test_peak_memory_is_what_lives_at_once_without_inputs() -> None:
    inputs = replace(inputs_of(1, 100), prompt_tokens=torch.ones(1, 1, 1))
    assert count_peak_bytes(Steps(), inputs) == 800


def test_the_budget_names_what_is_shared_and_each_head_the_rest(
    board: dict[str, Any], feature_cache: FeatureCache
) -> None:
    budget = board["budget"]
    assert (budget["epochs"], budget["batch_size"], budget["num_seeds"]) == (2, 16, 2)
    assert budget["train_samples"] == len(feature_cache.usable_samples("train"))
    assert "target_size" not in budget
    assert entry_of(board, "a line")["settings"]["target_size"] == [16, 24]
    assert entry_of(board, "a film")["settings"]["target_size"] == [8, 12]
    assert [run["seed"] for run in entry_of(board, "a film")["runs"]] == list(SEEDS)
    assert board["provenance"] == feature_cache.fingerprints
    assert board["protocol"]["split"] == "test"
    assert board["baselines"].keys() == {"all_empty", "all_full", "centre_prior"}
    assert {"device", "cpu", "threads", "torch"} <= board["machine"].keys()


def test_one_seed_has_no_standard_deviation(contenders: list[Contender], feature_cache: FeatureCache) -> None:
    alone = Contender("alone", contenders[0].run_dirs[:1])
    board = make_leaderboard([alone], feature_cache, split="test")
    assert board["heads"][0]["metrics"]["mean_iou"]["sd"] is None
    assert "±" not in tables(board)[0].to_markdown()
    assert "alone" in to_page(board, "a title")
    assert to_csv(board).splitlines()[1].startswith("1,alone,linear,1,")


def test_runs_that_differ_in_more_than_seeds_are_no_line_of_a_leaderboard(
    contenders: list[Contender], feature_cache: FeatureCache
) -> None:
    mixed = Contender("mixed", [contenders[0].run_dirs[0], contenders[1].run_dirs[0]])
    with pytest.raises(UsageError, match="mixed differ in more than their seeds"):
        make_leaderboard([mixed], feature_cache)
    with pytest.raises(UsageError, match="needs a head"):
        make_leaderboard([], feature_cache)
    with pytest.raises(UsageError, match="nothing has no run"):
        make_leaderboard([Contender("nothing", [])], feature_cache)


def test_the_files_hold_the_same_figures(board: dict[str, Any], tmp_path: Path) -> None:
    write(board, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([JSON, CSV, MARKDOWN, PAGE])
    assert json.loads((tmp_path / JSON).read_text()) == json.loads(json.dumps(board))
    rows = list(csv.DictReader(io.StringIO((tmp_path / CSV).read_text())))
    assert [row["name"] for row in rows] == [
        *(entry["name"] for entry in board["heads"]),
        *("all_empty", "all_full", "centre_prior"),
    ]
    for rank, (row, entry) in enumerate(zip(rows, board["heads"], strict=False), 1):
        assert int(row["rank"]) == rank
        for metric in ("mean_iou", "overall_iou", "p_at_0.5"):
            assert float(row[metric]) == entry["metrics"][metric]["mean"]
            assert float(row[f"{metric}_sd"]) == entry["metrics"][metric]["sd"]
        for kind, found in entry["slices"].items():
            assert float(row[f"mean_iou[{kind}]"]) == found["mean"]
        assert float(row["latency_ms"]) == entry["cost"]["latency_ms"]
    markdown, page = (tmp_path / MARKDOWN).read_text(), (tmp_path / PAGE).read_text()
    for entry in board["heads"]:
        spread = entry["metrics"]["mean_iou"]
        shown = f"{spread['mean']:.3f} ± {spread['sd']:.3f}"
        assert shown in markdown
        assert shown in page
    assert "it is \\<too\\> large" in markdown
    assert "it is &lt;too&gt; large" in page
    sizes = {entry["name"]: " x ".join(map(str, entry["settings"]["target_size"])) for entry in board["heads"]}
    said = "Target size: " + ", ".join(f"{name} {size}" for name, size in sizes.items()) + "."
    assert said in markdown
    assert said in page
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script" not in page
    assert to_page(board, "t") == to_page(board, "t")


def test_names_stay_in_their_cells(board: dict[str, Any]) -> None:
    hostile = json.loads(json.dumps(board))
    hostile["heads"][0]["name"] = 'a|b\n<img src=x onerror="alert(1)">'
    for entry in hostile["heads"]:
        entry["slices"] = {"=kind|": next(iter(entry["slices"].values()))}
    page, markdown = to_page(hostile, "<b>"), to_markdown(hostile, "<b>")
    assert "<img" not in page
    assert "<b>" not in page
    assert "<img" not in markdown.replace("\\<img", "")
    quality = tables(hostile)[0].to_markdown().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in quality}) == 1


def test_a_finding_says_when_seeds_cannot_tell_heads_apart(board: dict[str, Any]) -> None:
    near = json.loads(json.dumps(board))
    for entry, values in zip(near["heads"], ([0.5, 0.7], [0.4, 0.55]), strict=True):
        entry["metrics"]["mean_iou"] = Spread.of(values).to_dict()
    assert "overlaps" in finding(near)
    near["heads"][1]["metrics"]["mean_iou"] = Spread.of([0.3, 0.4]).to_dict()
    assert "overlaps" not in finding(near)
    assert "no better than the best baseline" not in finding(near)
    assert finding(near).startswith(f"{near['heads'][0]['name']} reaches the highest mean IoU, 0.600 ± 0.141")


def test_a_finding_says_when_no_head_is_better_than_a_baseline(board: dict[str, Any]) -> None:
    bad = json.loads(json.dumps(board))
    bad["baselines"]["centre_prior"]["mean_iou"] = 0.9
    assert "no better than the best baseline, centre prior" in finding(bad)


def test_names_of_near_points_do_not_cover_each_other() -> None:
    points = [Point(f"a head {place}", 5.0 + 0.3 * place, 0.60 + 0.01 * place, 0.01) for place in range(5)]
    figure = tradeoff_figure(points, "cost", ("baseline", 0.2))
    figure.canvas.draw()
    texts = [text for text in figure.axes[0].texts if text.get_text().startswith("a head")]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 5
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1)


def test_a_plot_says_what_it_shows_to_those_who_do_not_see_it() -> None:
    svg = draw_tradeoff("cost", [Point("only", 1.0, 0.5, None)], "cost", None, 'one "head"')
    assert 'aria-label="one &quot;head&quot;"' in svg
    assert ">only<" in svg
