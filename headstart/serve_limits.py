"""How much one may ask of a page at once."""

from __future__ import annotations

from dataclasses import dataclass

from cache_schema.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """How much one question may hold, and how many may wait.

    Args:
        max_file_bytes: the largest picture file.
        num_prompts, prompt_letters: how many prompts, and how long each.
        num_waiting: how many questions wait for their turn; one is answered at a time.
    """

    max_file_bytes: int = 20 * 2**20
    num_prompts: int = 16
    prompt_letters: int = 300
    num_waiting: int = 16


def parse_prompts(text: object, limits: Limits) -> list[str]:
    """The lines of a text that are not blank.

    Raises:
        UsageError: they are too many, or one is too long.
    """
    prompts = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    if len(prompts) > limits.num_prompts:
        raise UsageError(f"{len(prompts)} prompts are too many at once: leave {limits.num_prompts} lines.")
    longest = max(map(len, prompts), default=0)
    if longest > limits.prompt_letters:
        raise UsageError(f"a prompt has {longest} letters: shorten it to {limits.prompt_letters}.")
    return prompts
