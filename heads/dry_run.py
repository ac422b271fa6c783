"""What training a head will take, before it starts: parameters, operations, memory and time, from a few steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cache_schema.features import FeatureCache
from heads.checkpoint import HeadSpec
from heads.data import CachedSplit, feature_shapes
from heads.embedding import Embedder
from heads.flops import count_flops
from heads.inputs import Head
from heads.losses import total_loss
from heads.train_config import TrainConfig

_STEPS = 4
"""Steps that are tried; the first warms up and does not count."""


@dataclass(frozen=True)
class DryRun:
    """What one head will take.

    Args:
        flops_per_prompt: floating-point operations of a forward pass, over the prompts of a batch; additions and
            multiplications count as two.
        weight_bytes: weights, gradients, the optimizer's running means, and the running mean of the weights if any.
        activation_bytes: what the forward pass of one batch keeps for the backward pass.
        feature_bytes: the features that it reads, all of which are kept in memory where they fit.
        epoch_s: seconds of one epoch's steps, without reading from a disk and without validation.
    """

    head: str
    num_parameters: int
    num_trainable: int
    flops_per_prompt: float
    weight_bytes: int
    activation_bytes: int
    feature_bytes: int
    steps_per_epoch: int
    step_s: float
    epoch_s: float
    epochs: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """For people."""
        memory = self.weight_bytes + self.activation_bytes
        rows = {
            "parameters": f"{self.num_parameters:,}, of which {self.num_trainable:,} are trained",
            "operations": f"{self.flops_per_prompt / 1e9:.3g} GFLOP a prompt, forward",
            "memory": f"{memory / 1e6:.0f} MB for weights, optimizer and one batch, "
            f"and {self.feature_bytes / 1e6:.0f} MB of features",
            "time": f"{self.epoch_s:.1f} s an epoch of {self.steps_per_epoch} steps of {self.step_s * 1000:.0f} ms, "
            f"{self.epoch_s * self.epochs / 60:.1f} min for {self.epochs} epochs, without validation",
        }
        lines = [f"{self.head} on {self.device}"]
        return "\n".join([*lines, *(f"  {name:12}{text}" for name, text in rows.items())])


def dry_run(config: TrainConfig, cache: FeatureCache) -> DryRun:
    """Try a few steps on the first samples of the training split. Nothing is written, and nothing is trained.

    Raises:
        UsageError: the head, its arguments or its layers are unknown.
    """
    device = Accelerator().device
    torch.manual_seed(config.seed)
    head = HeadSpec(config.head, config.arguments, feature_shapes(cache)).build().to(device).train()
    size = config.target_size if config.needs_masks else None
    split = CachedSplit(
        cache,
        config.train_split,
        size,
        head.layers,
        "ram",
        device,
        attention=head.attention,
        first=config.batch_size * _STEPS,
    )
    batches = [split.load(draw) for draw in split.in_order(config.batch_size)]
    learner = Embedder(head) if config.compares_only else head
    inputs, num = batches[0].inputs.to(device), len(batches[0].samples)
    num_flops = count_flops(head, inputs)
    seconds, kept = [], 0
    for batch in (batches * _STEPS)[:_STEPS]:
        started = time.perf_counter()
        targets = batch.targets_at.get(config.target_size, batch.unmasked).to(device)
        with _counting(head) as saved:
            loss = total_loss(learner(batch.inputs.to(device)), targets, config.loss, config.loss_arguments)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.detach().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
        kept = max(kept, sum(saved.values()))
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.nbytes for parameter in trained)
    num_samples = len(cache.usable_samples(config.train_split))
    steps_per_epoch = -(-num_samples // config.batch_size)
    step_s = median(seconds[1:])
    return DryRun(
        head=config.head,
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        num_trainable=sum(parameter.numel() for parameter in trained),
        flops_per_prompt=num_flops / num,
        weight_bytes=sum(parameter.nbytes for parameter in head.parameters())
        + num_trained * (3 + (config.ema is not None)),
        activation_bytes=kept,
        feature_bytes=_feature_bytes(cache, config, head),
        steps_per_epoch=steps_per_epoch,
        step_s=step_s,
        epoch_s=step_s * steps_per_epoch,
        epochs=config.epochs,
        device=str(device),
    )


def _feature_bytes(cache: FeatureCache, config: TrainConfig, head: Head) -> int:
    """Bytes of the arrays that a head learns from, for the images of the training split."""
    samples, images = cache.samples.samples, cache.images
    rows = cache.usable_samples(config.train_split)
    num_images = len(set(samples.image_rows[rows].tolist())) * len(images.fixed_specs)
    grids = head.embedded_layers if config.compares_only else head.layers
    readers = [images.features(layer) for layer in grids]
    readers += [reader for layer in grids if (reader := images.scale(layer)) is not None]
    readers += [images.cls(layer) for layer in head.layers if layer in images.cls_layers]
    readers += [images.attention(name) for name in head.attention]
    return num_images * sum(reader.layout.row_bytes for reader in readers)


@contextmanager
def _counting(head: nn.Module) -> Iterator[dict[int, int]]:
    """Count the bytes that are kept for a backward pass, each memory block once; a head's own weights are not."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in head.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved
