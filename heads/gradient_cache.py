"""Large contrastive batches in little memory (Gao et al. 2021): each part is encoded twice, the loss taken once.

First all parts are encoded without keeping anything for gradients; the loss over all their pairs gives the gradients of
the embeddings; then each part is encoded again, and what its embeddings are to learn flows back through it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from heads.inputs import Embeddings, HeadOutputs
from heads.live import LiveInputs


def backward_in_parts(
    model: nn.Module,
    inputs: LiveInputs,
    loss_of: Callable[[Embeddings], Tensor],
    *,
    images_at_once: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    held: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Add to all gradients those of a loss over the embeddings of a whole batch; returns the loss.

    They are the gradients of one pass over the whole, also where something is dropped at random.

    Args:
        model: gives embeddings of the images and prompts of `LiveInputs`.
        loss_of: the loss of the embeddings of the whole batch, images and prompts in its order.
        images_at_once: how many images are encoded at once, with the prompts about them.
        scale: of the loss, before its gradients are taken.
        held: within which all parts but the last go backward, so that processes wait for each other once.
    """
    num_images = int(inputs.cached.image_index.max()) + 1
    parts = [
        inputs.part(start, min(start + images_at_once, num_images)) for start in range(0, num_images, images_at_once)
    ]
    order = torch.cat([places for _, places in parts]).argsort()
    states, encoded = [], []
    for part, _ in parts:
        states.append(_random_states(order.device))
        with torch.no_grad():
            encoded.append(_embeddings(model(part)))
    torch.clear_autocast_cache()  # some versions of torch keep half-precision weights without their gradients
    image = torch.cat([part.image for part in encoded]).requires_grad_()
    text = torch.cat([part.text for part in encoded])[order].requires_grad_()
    learned = {name: value.detach().requires_grad_() for name, value in _learned(encoded[-1]).items()}
    loss = loss_of(Embeddings(image, text, learned.get("scale"), learned.get("bias")))
    scale(loss).backward()  # type: ignore[no-untyped-call]
    assert text.grad is not None
    gradients = torch.zeros_like(image) if image.grad is None else image.grad
    start = 0
    after = _random_states(order.device)
    for number, ((part, places), state) in enumerate(zip(parts, states, strict=True)):
        is_last = number + 1 == len(parts)
        _set_random_states(state, order.device)
        with nullcontext() if is_last else held():
            again = _embeddings(model(part))
            image_gradient = gradients[start : start + len(again.image)]
            flows = [(again.image, image_gradient), (again.text, text.grad[places])]
            if is_last:
                flows += [
                    (value, gradient_of)
                    for name, value in _learned(again).items()
                    if (gradient_of := learned[name].grad) is not None
                ]
            flows = [(value, gradient) for value, gradient in flows if value.requires_grad]
            torch.autograd.backward([value for value, _ in flows], [gradient for _, gradient in flows])
        start += len(again.image)
    _set_random_states(after, order.device)
    return loss.detach()


def _learned(embeddings: Embeddings) -> dict[str, Tensor]:
    """What there is beside image and text."""
    return {name: value for name in ("scale", "bias") if (value := getattr(embeddings, name)) is not None}


def _embeddings(outputs: HeadOutputs) -> Embeddings:
    assert outputs.embeddings is not None
    embeddings = outputs.embeddings
    return replace(embeddings, image=embeddings.image.float(), text=embeddings.text.float())


def _random_states(device: torch.device) -> Sequence[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
