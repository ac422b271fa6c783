"""What holds for every head, as functions that the tests of each head call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from heads.export import FlatHead, export_head
from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs

LENGTHS = (5, 3, 7, 1, 4, 6, 2, 5)


def make_inputs(shapes: FeatureShapes, num_images: int = 3, num_prompts: int = 8, seed: int = 0) -> HeadInputs:
    """Noise of the shapes that a head was built for; prompts of several lengths, several to an image."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths = torch.tensor([LENGTHS[prompt % len(LENGTHS)] for prompt in range(num_prompts)])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return HeadInputs(
        features={layer: noise(num_images, *grid) for layer, grid in shapes.grids.items()},
        cls={layer: noise(num_images, width) for layer, width in shapes.cls_widths.items()},
        prompt_tokens=noise(num_prompts, int(lengths.max()), shapes.token_width) * mask[..., None],
        prompt_mask=mask,
        pooled=noise(num_prompts, shapes.pooled_width),
        image_index=torch.arange(num_prompts) % num_images,
        attention={name: noise(num_images, *shape) for name, shape in shapes.attention.items()},
    )


def check_tokens_are_missed_by_who_reads_them(head: Head, inputs: HeadInputs) -> None:
    """A head that says it reads no prompt tokens says the same without any; one that reads them says something else."""
    head.eval()
    none = dataclasses.replace(inputs, prompt_tokens=inputs.prompt_tokens[:, :0], prompt_mask=inputs.prompt_mask[:, :0])
    others = dataclasses.replace(inputs, prompt_tokens=inputs.prompt_tokens + 3 * inputs.prompt_mask[..., None])
    with torch.no_grad():
        expected = tensors_of(head(inputs))
        found = tensors_of(head(others if head.reads_tokens else none))
    same = all(torch.equal(found[name], value) for name, value in expected.items())
    assert same != head.reads_tokens


def tensors_of(outputs: HeadOutputs) -> dict[str, Tensor]:
    """The outputs that a head gives for each prompt."""
    fields = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def select(inputs: HeadInputs, prompts: list[int]) -> HeadInputs:
    """Some of the prompts, with their images alone."""
    images, index = torch.unique(inputs.image_index[prompts], return_inverse=True)

    def of_images(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[images] for name, tensor in tensors.items()}

    longest = int(inputs.prompt_mask[prompts].sum(1).max())
    return HeadInputs(
        features=of_images(inputs.features),
        cls=of_images(inputs.cls),
        prompt_tokens=inputs.prompt_tokens[prompts, :longest],
        prompt_mask=inputs.prompt_mask[prompts, :longest],
        pooled=inputs.pooled[prompts],
        image_index=index,
        attention=of_images(inputs.attention),
    )


def check_prompts_do_not_see_each_other(head: Head, inputs: HeadInputs, tolerance: float = 1e-4) -> None:
    """A prompt gets the same answer alone, with its image alone and without padding, as in a batch."""
    head.eval()
    with torch.no_grad():
        together = tensors_of(head(inputs))
        for prompt in range(len(inputs.image_index)):
            alone = tensors_of(head(select(inputs, [prompt])))
            assert alone.keys() == together.keys()
            for name, tensor in alone.items():
                expected = together[name][prompt : prompt + 1]
                if name == "word_attention":
                    assert not expected[:, tensor.shape[1] :].any(), "padding is looked at"
                    expected = expected[:, : tensor.shape[1]]
                torch.testing.assert_close(
                    tensor, expected, atol=tolerance, rtol=tolerance, msg=lambda said, name=name: f"{name}: {said}"
                )


def check_padding_is_not_seen(head: Head, inputs: HeadInputs, tolerance: float = 1e-5) -> None:
    """What stands behind the tokens of a prompt changes nothing."""
    head.eval()
    spoiled = torch.where(inputs.prompt_mask[..., None], inputs.prompt_tokens, 1e4)
    more = torch.nn.functional.pad(spoiled, (0, 0, 0, 3), value=-1e4)
    mask = torch.nn.functional.pad(inputs.prompt_mask, (0, 3))
    with torch.no_grad():
        clean = head(inputs).mask_logits
        padded = head(dataclasses.replace(inputs, prompt_tokens=more, prompt_mask=mask)).mask_logits
    torch.testing.assert_close(padded, clean, atol=tolerance, rtol=tolerance)


def check_gradients_reach_everything(head: Head, inputs: HeadInputs, loss: Callable[[HeadOutputs], Tensor]) -> None:
    """Every parameter has a gradient that is not zero throughout."""
    head.train()
    head.zero_grad()
    loss(head(inputs)).backward()
    dead = [
        name
        for name, parameter in head.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert not dead, f"no gradient reaches {', '.join(dead)}"


def sum_of_outputs(outputs: HeadOutputs) -> Tensor:
    """A loss that asks for everything a head says, unlike any of its symmetries."""
    total = torch.zeros(())
    for tensor in tensors_of(outputs).values():
        weight = torch.linspace(-1, 1, tensor.numel()).sin().view(tensor.shape)
        total = total + (tensor * weight).sum() + (tensor**2).mean()
    if outputs.embeddings is not None:
        total = total + (outputs.embeddings.text**2).sum() + (outputs.embeddings.text.sin()).sum()
        for extra in (outputs.embeddings.scale, outputs.embeddings.bias):
            total = total if extra is None else total + extra
    return total


def check_export(head: Head, inputs: HeadInputs, others: HeadInputs, tolerance: float = 1e-4) -> None:
    """torch.export gives a program for any number of images, prompts and tokens that says what the head says."""
    program = export_head(head, inputs).module()
    for given in (inputs, others):
        arguments = (dict(given.features), dict(given.cls), dict(given.attention), given.prompt_tokens)
        arguments = (*arguments, given.prompt_mask, given.pooled, given.image_index)  # type: ignore[assignment]
        with torch.no_grad():
            expected: dict[str, Any] = FlatHead(head.eval())(*arguments)
            found = program(*arguments)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance)


def overfit(
    head: Head, inputs: HeadInputs, size: tuple[int, int] = (32, 32), steps: int = 300, rate: float = 1e-3
) -> float:
    """Mean IoU of 8 masks of different places and sizes, after training on them alone; give 8 prompts."""
    from heads.losses import resize_logits

    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    num = len(inputs.image_index)
    centres, radii = torch.rand((num, 2), generator=generator), 0.15 + 0.2 * torch.rand(num, generator=generator)
    truth = torch.stack(
        [
            ((rows / size[0] - y) ** 2 + (columns / size[1] - x) ** 2) < radius**2
            for (y, x), radius in zip(centres.tolist(), radii.tolist(), strict=True)
        ]
    )
    head.train()
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    for _ in range(steps):
        logits = resize_logits(head(inputs).mask_logits, size)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        predicted = resize_logits(head(inputs).mask_logits, size) > 0
    overlap, union = (predicted & truth).flatten(1).sum(1), (predicted | truth).flatten(1).sum(1)
    return float((overlap / union).mean())
