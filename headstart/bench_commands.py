"""The commands that compare: `headstart bench ...`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from cache_schema.errors import UsageError
from headstart.command import Command, Json, Place


@dataclass(frozen=True)
class BenchHeads:
    """Compare heads under one budget over one cache: train each with several seeds, score them, measure their cost.

    Leaves leaderboard.json, .csv, .md and .html: quality with its spread over seeds, quality by kind of prompt,
    parameters, operations, latency, throughput, memory, and a plot of quality against cost. Killed or repeated, it goes
    on where it was and trains nothing twice.

    Example: headstart bench heads --heads linear,film,juras --set epochs=5 batch_size=32 prompts_per_image=4
    """

    heads: Annotated[str, arg(metavar="RECIPE,RECIPE,...")]
    """Which recipes; `headstart train --help` lists them."""
    stores: Place = "stores"
    """Folder with one store of each kind; s3://bucket/folder and the like work too."""
    samples: Place | None = None
    """The samples store, where the folder holds several."""
    images: Place | None = None
    """The image-feature store, where the folder holds several."""
    prompts: Place | None = None
    """The prompt-feature store, where the folder holds several."""
    runs: Path = Path("runs")
    """Folder the runs' own folders are made in."""
    out: Path = Path("leaderboard")
    """Folder the leaderboard is written to."""
    seeds: int = 3
    """With how many seeds each head is trained: 0, 1, ..."""
    split: str = "val"
    """Which split to score."""
    set: tuple[str, ...] = field(default=())
    """Settings to replace, as key=value, for all recipes that know them, or as recipe.key=value for one. Epochs, batch
    size and prompts per image must be the same for all."""
    skip_impossible: bool = False
    """Leave out heads that this cache cannot serve, and say so, instead of stopping before any training."""
    residency: Literal["auto", "device", "ram", "disk"] = "auto"
    """Where features are kept while training; auto takes the first they fit into half of what is free of."""
    dry_run: bool = False
    """Only try a few steps of each head: say what the comparison takes. Nothing is written."""
    json: Json = False

    def run(self) -> Any:
        from evaluate.leaderboard_files import PAGE, finding, tables
        from headstart import api, bench_heads
        from headstart.recipes import parse_overrides

        recipes = [name.strip() for name in self.heads.split(",") if name.strip()]
        if not recipes:
            raise UsageError("name the heads to compare, such as --heads linear,film.")
        settings = parse_overrides(self.set)
        cache = api.open_cache(self.stores, samples=self.samples, images=self.images, prompts=self.prompts)
        if self.dry_run:
            plan = bench_heads.plan_bench(
                recipes,
                cache,
                self.runs,
                num_seeds=self.seeds,
                split=self.split,
                settings=settings,
                skip_impossible=self.skip_impossible,
            )
            tried = bench_heads.try_bench(plan, cache)
            seconds = self.seeds * sum(one.epoch_s * one.epochs for one in tried.values())
            print("\n".join(f"{recipe}: {one.table()}" for recipe, one in tried.items()))
            _print_left_out(plan.left_out)
            print(f"{len(tried)} heads with {self.seeds} seeds each: {seconds / 60:.1f} min, without validation")
            entries = [{"name": recipe, **one.to_dict()} for recipe, one in tried.items()]
            return {"heads": entries, "left_out": dict(plan.left_out), "train_s": seconds}
        board = bench_heads.bench_heads(
            recipes,
            cache,
            self.runs,
            self.out,
            num_seeds=self.seeds,
            split=self.split,
            settings=settings,
            skip_impossible=self.skip_impossible,
            residency=self.residency,
        )
        print("\n\n".join(f"{table.title}\n{table.to_markdown()}" for table in tables(board)) + "\n")
        _print_left_out(board["left_out"])
        print(finding(board))
        print(f"leaderboard: {self.out / PAGE}")
        return board


def _print_left_out(left_out: Mapping[str, str]) -> None:
    for name, why in left_out.items():
        print(f"left out {name}: {why}")


BENCH_COMMANDS: dict[str, type[Command]] = {"heads": BenchHeads}
