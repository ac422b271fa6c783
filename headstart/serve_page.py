"""The page: a picture, prompts, a choice of heads, and what the chosen head says. Made with Gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from cache_schema.errors import UsageError
from headstart.serve_limits import Limits, parse_prompts
from headstart.served_answer import STYLE, render_answer, render_hint, render_mistake
from headstart.served_heads import ServedHeads, UnusablePictureError

PAGE_STYLE = f"""{STYLE}
footer {{ display: none !important; }}
.gradio-container > .main {{ max-width: 1240px !important; margin: 0 auto !important; padding: 1rem !important; }}
#title .html-container, #answer .html-container {{ padding: 0 !important; }}
#title h1 {{ font-size: 1.4rem; font-weight: 700; margin: 0; }}
#title p {{ margin: .1rem 0 0; }}
"""

_HEADER = """
<h1>headstart</h1>
<p>Drop a picture and say what to segment, one prompt on each line: each gets a mask of its own.</p>
"""
_TIDY_S, _KEEP_S = 300, 3600
"""How often uploads are looked through, and how old one may become, in seconds."""

_NO_PICTURE = "Drop a picture first."
_NO_PROMPT = "Now say what to segment, one prompt on each line."


def make_page(heads: ServedHeads, limits: Limits, uploads: Path) -> Any:
    """A `gradio.Blocks` that answers by those heads. It reads files under `uploads` only, and writes none."""

    def answer(picture: object, text: object, name: object) -> tuple[str, Any]:
        """HTML to show, and the picture: a file that cannot be used is taken off the page.

        The arguments are whatever a request holds.
        """
        path = _uploaded(picture, uploads)
        if path is None:
            return render_hint(_NO_PICTURE), gr.skip()
        try:
            prompts = parse_prompts(text, limits)
            head = str(name)
            try:
                asked = heads.ask(head, path, prompts)
            except UnusablePictureError as error:
                return render_mistake(str(error)), None
            if not prompts:
                return render_hint(_NO_PROMPT), gr.skip()
            return render_answer(head, asked, has_attention=heads.has_attention(head)), gr.skip()
        except UsageError as mistake:
            return render_mistake(str(mistake)), gr.skip()

    with gr.Blocks(
        title="headstart", analytics_enabled=False, delete_cache=(_TIDY_S, _KEEP_S), fill_width=True
    ) as page:
        gr.HTML(_HEADER, elem_id="title", js_on_load=None)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=300,
                    elem_id="picture",
                    alt_text="The picture to segment",
                )
                prompts = gr.Textbox(
                    label="Prompts, one on each line",
                    placeholder="the red circle\nall squares",
                    lines=3,
                    max_lines=limits.num_prompts,
                    elem_id="prompts",
                )
                names = gr.Radio(
                    heads.names, value=heads.names[0], label="Head", elem_id="head", visible=len(heads.names) > 1
                )
                button = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(render_hint(_NO_PICTURE), elem_id="answer", js_on_load=None)
        gr.on(
            [button.click, prompts.submit, picture.upload, names.change],
            answer,
            [picture, prompts, names],
            [shown, picture],
            preprocess=False,
            api_visibility="private",
            concurrency_limit=1,
            show_progress_on=[shown],
            trigger_mode="always_last",
        )
        picture.clear(lambda: render_hint(_NO_PICTURE), None, [shown], api_visibility="private")
    page.queue(max_size=limits.num_waiting, api_open=False)
    return page


def make_theme() -> Any:
    """Looks that need no font from elsewhere."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(  # white on Gradio's own orange is hard to read
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
    )


def _uploaded(picture: object, uploads: Path) -> Path | None:
    """The file of a picture as Gradio hands it over, if it is one that was uploaded."""
    if not isinstance(picture, dict) or not isinstance(picture.get("path"), str):
        return None
    path = Path(picture["path"]).resolve()
    return path if path.is_relative_to(uploads.resolve()) else None
