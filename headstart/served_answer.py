"""What a page shows of a head's answer, as HTML that holds its pictures in itself.

Prompts and names are data: the templates escape them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluate.pictures import data_uri, encode_jpeg, overlay, resize_mask
from evaluate.predictor import Prediction
from evaluate.word_attention import draw_words, relative_attention
from headstart.served_heads import Asked

SHOWN_PX, WORD_PX = 1024, 224
"""The longer side of a picture with its mask, and of a word's picture, at most."""

_ANSWER = """
<section class="hs-answer" aria-live="polite">
<p class="hs-note">{{ head }} on {{ width }} x {{ height }} pixels.
{%- if not has_attention %} This head sees a prompt as one vector: it has no attention per word.{% endif %}</p>
<div class="hs-results">
{% for one in results %}
<figure class="hs-result">
<img class="hs-mask" src="{{ one.uri }}" alt="{{ one.alt }}" width="{{ one.width }}" height="{{ one.height }}">
<figcaption>
<span class="hs-prompt" dir="auto">{{ one.prompt }}</span>
<span class="hs-figures">
{% if one.no_target %}<strong class="hs-no-target">no target</strong>{% endif %}
<span class="hs-score">{{ one.score_kind }} <b>{{ one.score }}</b></span>
<span class="hs-share">{{ one.share }}</span>
</span>
{% if one.no_target %}<span class="hs-note">The head says that this names nothing here; the mask is what it would mark
all the same.</span>{% endif %}
</figcaption>
{% if one.words %}
<div class="hs-words" role="group" aria-label="attention per word">
{% for word in one.words %}
<figure class="hs-word"><img src="{{ word.uri }}" alt="{{ word.alt }}">
<figcaption><span dir="auto">{{ word.word }}</span> <span class="hs-times">{{ word.times }}</span></figcaption></figure>
{% endfor %}
</div>
{% endif %}
</figure>
{% endfor %}
</div>
{% if has_attention %}<p class="hs-note">Under each mask, each word's attention: coloured where the word has more than
its mean over the picture. The number is its highest multiple of that mean.</p>{% endif %}
</section>
"""

_MESSAGE = '<p class="hs-message hs-{{ kind }}" role="{{ role }}">{{ text }}</p>'

_TEMPLATES = jinja2.Environment(
    loader=jinja2.DictLoader({"answer": _ANSWER, "message": _MESSAGE}),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)

STYLE = """
#answer { --hs-pale: #5f6368; --hs-wrong: #b3261e; }
.dark #answer { --hs-pale: #a8adb4; --hs-wrong: #ff8a80; }
.hs-results { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem;
  align-items: start; }
.hs-result { margin: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden;
  background: var(--block-background-fill); }
.hs-mask { display: block; width: 100%; height: auto; max-height: 70vh; object-fit: contain; }
.hs-result > figcaption { padding: .6rem .8rem; display: flex; flex-direction: column; gap: .2rem; }
.hs-prompt { font-weight: 600; overflow-wrap: anywhere; max-height: 6rem; overflow-y: auto; }
.hs-figures { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-variant-numeric: tabular-nums; }
.hs-no-target { color: var(--hs-wrong); }
.hs-share, .hs-note, .hs-times { color: var(--hs-pale); }
.hs-note { font-size: .85rem; margin: .4rem 0; overflow-wrap: anywhere; }
.hs-answer > .hs-note:first-child { margin-top: 0; }
.hs-words { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.2rem, 1fr)); gap: .5rem;
  padding: 0 .8rem .8rem; }
.hs-word { margin: 0; font-size: .8rem; line-height: 1.3; min-width: 0; }
.hs-word img { width: 100%; height: auto; border-radius: 4px; display: block; margin-bottom: .15rem; }
.hs-word figcaption { display: flex; flex-direction: column; overflow-wrap: anywhere; }
.hs-message { margin: 0; padding: .8rem 1rem; border-radius: 8px; border: 1px solid var(--border-color-primary);
  overflow-wrap: anywhere; }
.hs-mistake { border-color: var(--hs-wrong); border-left-width: 5px; }
"""


@dataclass(frozen=True)
class _Word:
    """One word's picture, and its highest multiple of its mean."""

    word: str
    times: str
    uri: str
    alt: str


@dataclass(frozen=True)
class _Shown:
    """One prompt's part of the answer."""

    prompt: str
    uri: str
    alt: str
    width: int
    height: int
    score_kind: str
    score: str
    share: str
    no_target: bool
    words: Sequence[_Word]


def render_answer(head: str, asked: Asked, *, has_attention: bool) -> str:
    """The picture with each prompt's mask and score, and, where the head has it, each word's attention."""
    height, width = asked.image.shape[:2]
    return _TEMPLATES.get_template("answer").render(
        head=head, width=width, height=height, has_attention=has_attention, results=list(_show(asked))
    )


def render_mistake(text: str) -> str:
    """One sentence about what cannot be done."""
    return _TEMPLATES.get_template("message").render(text=text, kind="mistake", role="alert")


def render_hint(text: str) -> str:
    """One sentence about what to do next."""
    return _TEMPLATES.get_template("message").render(text=text, kind="hint", role="status")


def _show(asked: Asked) -> Iterator[_Shown]:
    image = asked.image
    scale = min(1.0, SHOWN_PX / max(image.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = (
        image if scale == 1 else np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    )
    for prediction in asked.predictions:
        share = f"{prediction.mask.mean():.1%} marked" if prediction.mask.any() else "nothing marked"
        yield _Shown(
            prompt=prediction.prompt,
            uri=data_uri(encode_jpeg(overlay(small, resize_mask(prediction.mask, (height, width)))), "jpeg"),
            alt=f"The picture with the mask for {prediction.prompt}: {share}",
            width=width,
            height=height,
            score_kind="mean probability" if prediction.predicted_iou is None else "expected IoU",
            score=f"{prediction.score:.2f}",
            share=share,
            no_target=bool(prediction.no_target),
            words=[] if prediction.attention is None else list(_show_words(image, prediction)),
        )


def _show_words(image: NDArray[np.uint8], prediction: Prediction) -> Iterator[_Word]:
    highest = relative_attention(prediction).max((1, 2))
    pictures = draw_words(image, prediction, WORD_PX)
    for word, most, picture in zip(prediction.words, highest, pictures, strict=True):
        times = f"{most:.2f} \N{MULTIPLICATION SIGN}"
        alt = f"Where {word} has attention, at most {most:.2f} times its mean"
        yield _Word(word, times, data_uri(encode_jpeg(picture), "jpeg"), alt)
