"""The classes of an open vocabulary: what each is called, and what a text encoder says of its names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cache_schema.errors import UsageError
from evaluate.open_vocabulary.templates import TemplateSet, fill
from evaluate.rounding import as_cached
from extract.encoders.protocols import TextEncoder

BACKGROUND = "background"

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class OpenClass:
    """One class.

    Args:
        name: what it is called in tables and legends.
        spellings: what is put into the templates: one or more names of the same thing.
    """

    name: str
    spellings: tuple[str, ...]

    def prompts(self, templates: TemplateSet) -> list[str]:
        """Every spelling in every template."""
        return [prompt for spelling in self.spellings for prompt in fill(templates, spelling)]


def parse_classes(text: str) -> list[OpenClass]:
    """Classes as they are named on a command line, with commas between them; `_` stands for a blank.

    >>> [found.name for found in parse_classes("pikachu, traffic_sign")]
    ['pikachu', 'traffic sign']

    Raises:
        UsageError: there is none, one is empty or stands there twice, or one is called "background" in
            whatever case.
    """
    names = [" ".join(part.replace("_", " ").split()) for part in text.split(",")]
    if not all(names):
        raise UsageError("a class has no name: separate the names by single commas, as in pikachu,traffic_sign.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)} stands there twice; name each class once.")
    if BACKGROUND in map(str.casefold, names):
        raise UsageError("background is not a class that one can prompt for; ask for it with --background.")
    return [OpenClass(name, (name,)) for name in names]


@dataclass(frozen=True)
class ClassPrompts:
    """What a text encoder says of c classes, each of which has one or more of the b prompts.

    Args:
        pooled: (b, p) pooled prompt features.
        tokens, mask: (b, l, e) token features, 0 where the mask is False.
        class_index: (b,) the class of each prompt; they come class by class.
    """

    pooled: Float[Tensor, "b p"]
    tokens: Float[Tensor, "b l e"]
    mask: Bool[Tensor, "b l"]
    class_index: Int[Tensor, " b"]

    @property
    def num_classes(self) -> int:
        return int(self.class_index[-1]) + 1

    def mean_over_prompts(self, values: Float[Tensor, "b ..."]) -> Float[Tensor, "c ..."]:
        """What is said of each prompt, averaged over the prompts of each class."""
        total = values.new_zeros(self.num_classes, *values.shape[1:]).index_add_(0, self.class_index, values)
        counts = torch.bincount(self.class_index, minlength=self.num_classes)
        return total / counts.reshape(-1, *[1] * (values.ndim - 1))

    def mean_pooled(self) -> Float[Tensor, "c p"]:
        """The pooled features of each class, averaged before anything is done to them."""
        return self.mean_over_prompts(self.pooled)

    def mean_tokens(self) -> Float[Tensor, "c e"]:
        """The mean token of each prompt, averaged over the prompts of each class."""
        mask = self.mask[..., None]
        return self.mean_over_prompts((self.tokens * mask).sum(1) / mask.sum(1).clamp(min=1))

    def to(self, device: torch.device) -> ClassPrompts:
        """The same on a device."""
        moved = (self.pooled, self.tokens, self.mask, self.class_index)
        return ClassPrompts(*(tensor.to(device) for tensor in moved))


@torch.inference_mode()
def encode_classes(
    classes: Sequence[OpenClass], templates: TemplateSet, encoder: TextEncoder, dtype: str
) -> ClassPrompts:
    """Encode every prompt of every class, in float32 on the CPU.

    Args:
        dtype: the data type in which a head's training features were cached; what is encoded is rounded to it.

    Raises:
        UsageError: there is no class.
    """
    if not classes:
        raise UsageError("there is no class to look for; name some, such as pikachu,forest,road.")
    prompts = [(row, prompt) for row, found in enumerate(classes) for prompt in found.prompts(templates)]
    pooled, tokens, masks = [], [], []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        said = encoder.encode(encoder.tokenize([prompt for _, prompt in prompts[start : start + _PROMPTS_AT_ONCE]]))
        pooled.append(as_cached(said.pooled, dtype).float().cpu())
        tokens.append(as_cached(said.tokens.masked_fill(~said.mask[..., None], 0), dtype).float().cpu())
        masks.append(said.mask.cpu())
    longest = max(mask.shape[1] for mask in masks)
    return ClassPrompts(
        pooled=torch.cat(pooled),
        tokens=torch.cat([_lengthen(part, longest) for part in tokens]),
        mask=torch.cat([_lengthen(part, longest) for part in masks]),
        class_index=torch.tensor([row for row, _ in prompts]),
    )


def _lengthen(values: Tensor, length: int) -> Tensor:
    """(b, l, ...) values with zeros behind them up to that length."""
    padded = values.new_zeros(len(values), length, *values.shape[2:])
    padded[:, : values.shape[1]] = values
    return padded


def num_prompts(classes: Iterable[OpenClass], templates: TemplateSet) -> int:
    """How many prompts the classes have in all."""
    return sum(len(found.prompts(templates)) for found in classes)
