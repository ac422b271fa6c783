"""Recall of image-text retrieval: what says how well embeddings match where nobody drew masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from heads.inputs import Embeddings

RANKS = (1, 5, 10)


def retrieval_recall(
    embeddings: Embeddings, image_index: Int[Tensor, " b"], *, ranks: Sequence[int] = RANKS, chunk: int = 1024
) -> dict[str, float]:
    """Shares, from 0 to 1, of prompts and of images that find what belongs to them among the best k, by name.

    `text_to_image_recall@k`: of the b prompts, those whose image is among the k most similar of the i images.
    `image_to_text_recall@k`: of the images that have prompts, those with one of their prompts among the k most similar
    of the b prompts. A prompt and an image are as similar as the prompt and the candidate nearest to it: cosine along
    the channels. Whatever is exactly as similar as the right answer counts as found before it.

    Args:
        embeddings: of a whole split, each image once; scale and bias change no order and are not looked at.
        image_index: which of the i images each prompt is about.
        chunk: prompts that are compared with all images at once, which bounds memory.
    """
    text = F.normalize(embeddings.text.detach().float(), dim=-1)
    candidates = F.normalize(embeddings.image.detach().float(), dim=-1)
    num_images = len(candidates)
    rows = torch.split(torch.arange(len(text), device=text.device), chunk)
    own = torch.cat([_similarities(text[part], candidates).gather(1, image_index[part, None]) for part in rows])[:, 0]
    best = torch.full((num_images,), -torch.inf, device=own.device).scatter_reduce(0, image_index, own, "amax")
    images_before, prompts_before = [], torch.zeros(num_images, dtype=torch.int64, device=text.device)
    for part in rows:
        scores = _similarities(text[part], candidates)
        others = image_index[part, None] != torch.arange(num_images, device=text.device)
        images_before.append((others & (scores >= own[part, None])).sum(1))
        prompts_before += (others & (scores >= best)).sum(0)
    has_prompts = torch.zeros(num_images, dtype=torch.bool, device=text.device)
    has_prompts[image_index] = True
    before = {"text_to_image": torch.cat(images_before), "image_to_text": prompts_before[has_prompts]}
    return {
        f"{way}_recall@{rank}": float((count < rank).double().mean()) for way, count in before.items() for rank in ranks
    }


class Retrieval:
    """The embeddings of a split, handed over batch by batch; each image is kept once."""

    def __init__(self) -> None:
        self._images: dict[int, Tensor] = {}
        self._texts: list[Tensor] = []
        self._image_ids: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, embeddings: Embeddings, image_index: Int[Tensor, " b"], image_ids: Int[Tensor, " i"]) -> None:
        """The embeddings of one batch."""
        self._images |= dict(zip(image_ids.tolist(), embeddings.image.float(), strict=True))
        self._texts.append(embeddings.text.float())
        self._image_ids += image_ids[image_index].tolist()

    def recall(self, ranks: Sequence[int] = RANKS) -> dict[str, float]:
        """See `retrieval_recall`."""
        places = {image_id: place for place, image_id in enumerate(self._images)}
        embeddings = Embeddings(torch.stack(list(self._images.values())), torch.cat(self._texts))
        index = torch.tensor([places[image_id] for image_id in self._image_ids], device=embeddings.text.device)
        return retrieval_recall(embeddings, index, ranks=ranks)

    @classmethod
    def merge(cls, parts: Iterable[Retrieval]) -> Retrieval:
        """What several processes were handed, on the CPU."""
        merged = cls()
        for part in parts:
            merged._images |= {image_id: image.cpu() for image_id, image in part._images.items()}
            merged._texts += [text.cpu() for text in part._texts]
            merged._image_ids += part._image_ids
        return merged


def _similarities(text: Float[Tensor, "b d"], candidates: Float[Tensor, "i k d"]) -> Float[Tensor, "b i"]:
    """Dot product of each prompt with the candidate of each image that is nearest to it."""
    return (text @ candidates.flatten(0, 1).T).reshape(len(text), *candidates.shape[:2]).amax(-1)
