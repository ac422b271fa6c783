"""Text encoders return what transformers returns for the same checkpoint, called as its family was trained."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    PreTrainedTokenizerBase,
    Siglip2Model,
    Siglip2TextModel,
    Siglip2Tokenizer,
    SiglipModel,
    SiglipTextModel,
)

from cache_schema.errors import UsageError
from cache_schema.fingerprint import canonical_json, fingerprint
from extract.encoders.protocols import TextEncoder, TextEncoding
from extract.encoders.specs import Precision, TextEncoderSpec
from extract.encoders.text import TEXT_FAMILIES, HubTextEncoder, load_text_encoder
from tests.extract.text_checkpoints import (
    HAS_SENTENCEPIECE,
    LIMIT,
    NAMES,
    make_clip_tokenizer,
    make_gemma_tokenizer,
    save_text_checkpoint,
)

PROMPTS = (
    "the red circle",
    "red",
    "",
    "A dog LEFT of the Red circle",
    "a zxqv, 3.5 and é",
    "Red  CIRCLE\n!",
    "the dog of the left " * 10,
)
PADDED = tuple(name for name in NAMES if name.startswith("siglip"))
HALF_TOLERANCES = {torch.bfloat16: 0.15, torch.float16: 0.02}
"""Of features that are about 1 large: a few steps of the half type, added up over two blocks."""

needs_sentencepiece = pytest.mark.skipif(not HAS_SENTENCEPIECE, reason="SiglipTokenizer needs sentencepiece")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All of `NAMES`."""
    parent = tmp_path_factory.mktemp("text")
    for name in NAMES:
        save_text_checkpoint(name, parent / name)
    return {name: parent / name for name in NAMES}


@pytest.fixture(scope="module")
def encoders(checkpoints: dict[str, Path]) -> dict[str, HubTextEncoder]:
    return {name: load(path) for name, path in checkpoints.items()}


def load(checkpoint: Path, **settings: Any) -> HubTextEncoder:
    return load_text_encoder(TextEncoderSpec(str(checkpoint), **settings))


def copy_of(checkpoint: Path, parent: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(checkpoint, parent / name))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def inputs_by_transformers(checkpoint: Path, name: str, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What each family's documentation says to give to the model."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    settings = {"truncation": True, "max_length": LIMIT, "return_tensors": "pt"}
    if name in PADDED:
        lowered = [prompt.lower() for prompt in prompts]
        return {"input_ids": tokenizer(lowered, padding="max_length", **settings)["input_ids"]}
    return dict(tokenizer(list(prompts), padding=True, **settings))


@torch.inference_mode()
def features_by_transformers(checkpoint: Path, name: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(b, l, d) tokens, padding included, and (b, p) pooled; of a whole model by its own method."""
    if name == "bert":
        output = BertModel.from_pretrained(checkpoint).eval()(**inputs)
        return output.last_hidden_state, output.pooler_output
    if name.endswith("tower"):
        classes = {"clip-tower": CLIPTextModelWithProjection, "siglip2-tower": Siglip2TextModel}
        output = classes.get(name, SiglipTextModel).from_pretrained(checkpoint).eval()(**inputs)
        return output.last_hidden_state, output.text_embeds if name == "clip-tower" else output.pooler_output
    whole = {"clip": CLIPModel, "siglip2": Siglip2Model, "siglip2-left": Siglip2Model}.get(name, SiglipModel)
    model = whole.from_pretrained(checkpoint).eval()
    output = model.text_model(**inputs)
    pooled = model.text_projection(output.pooler_output) if name == "clip" else output.pooler_output
    return output.last_hidden_state, pooled


def own_tokens(name: str, states: Tensor, length: int) -> Tensor:
    """(l, d): those of one prompt's (padded, d) states that are not padding."""
    return states[-length:] if name.endswith("left") else states[:length]


def assert_same(encoding: TextEncoding, other: TextEncoding, *, atol: float) -> None:
    """Prompt by prompt, however wide the two are padded."""
    for row in range(len(encoding.mask)):
        torch.testing.assert_close(
            encoding.tokens[row][encoding.mask[row]], other.tokens[row][other.mask[row]], rtol=0, atol=atol
        )
    torch.testing.assert_close(encoding.pooled, other.pooled, rtol=0, atol=atol)


# Features


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_pooled_features_are_those_of_transformers(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], name: str
) -> None:
    encoder = encoders[name]
    token_ids = encoder.tokenize(PROMPTS)
    encoding = encoder.encode(token_ids)
    inputs = inputs_by_transformers(checkpoints[name], name, PROMPTS)
    states, pooled = features_by_transformers(checkpoints[name], name, inputs)
    assert isinstance(encoder, TextEncoder)
    assert encoding.tokens.shape == (len(PROMPTS), LIMIT, encoder.token_width) == (len(PROMPTS), LIMIT, 32)
    assert encoding.pooled.shape == (len(PROMPTS), encoder.pooled_width)
    for row, ids in enumerate(token_ids):
        assert own_tokens(name, inputs["input_ids"][row], len(ids)).tolist() == ids
        assert encoding.mask[row].tolist() == [True] * len(ids) + [False] * (LIMIT - len(ids))
        expected = own_tokens(name, states[row], len(ids))
        torch.testing.assert_close(encoding.tokens[row, : len(ids)], expected, rtol=0, atol=0)
    torch.testing.assert_close(encoding.pooled, pooled, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_half_precision_features_are_those_of_transformers_under_autocast(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], name: str, precision: Precision
) -> None:
    half = getattr(torch, precision)
    token_ids = encoders[name].tokenize(PROMPTS)
    encoding = load(checkpoints[name], precision=precision).encode(token_ids)
    assert encoding.pooled.dtype == half
    with torch.autocast("cpu", half):
        inputs = inputs_by_transformers(checkpoints[name], name, PROMPTS)
        states, pooled = features_by_transformers(checkpoints[name], name, inputs)
    for row, ids in enumerate(token_ids):
        expected = own_tokens(name, states[row], len(ids))
        torch.testing.assert_close(encoding.tokens[row, : len(ids)], expected, rtol=0, atol=0)
    torch.testing.assert_close(encoding.pooled, pooled, rtol=0, atol=0)
    in_full = encoders[name].encode(token_ids)
    as_full = TextEncoding(encoding.tokens.float(), encoding.mask, encoding.pooled.float())
    assert_same(as_full, in_full, atol=HALF_TOLERANCES[half])


@pytest.mark.parametrize("name", ["clip", "siglip2", "bert"])
def test_the_autocast_of_a_caller_does_not_decide_the_precision(encoders: dict[str, HubTextEncoder], name: str) -> None:
    encoder = encoders[name]
    plain = encoder.encode(encoder.tokenize(PROMPTS))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = encoder.encode(encoder.tokenize(PROMPTS))
    assert_same(under_autocast, plain, atol=0)


@pytest.mark.parametrize("name", NAMES)
@given(order=st.permutations(range(len(PROMPTS))), num_prompts=st.integers(1, len(PROMPTS)))
@settings(deadline=None, max_examples=15)
def test_who_stands_beside_a_prompt_in_a_batch_makes_no_difference(
    encoders: dict[str, HubTextEncoder], name: str, order: list[int], num_prompts: int
) -> None:
    encoder, rows = encoders[name], order[:num_prompts]
    token_ids = encoder.tokenize(PROMPTS)
    together = encoder.encode(token_ids)
    apart = encoder.encode([token_ids[row] for row in rows])
    assert apart.mask.sum(1).tolist() == [len(token_ids[row]) for row in rows]
    expected = TextEncoding(together.tokens[rows], together.mask[rows], together.pooled[rows])
    assert_same(apart, expected, atol=2e-5)


@pytest.mark.parametrize("name", PADDED)
def test_siglip_reads_its_padding_and_pools_at_the_last_position(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], name: str
) -> None:
    encoder = encoders[name]
    token_ids = encoder.tokenize(["red dog"])
    encoding = encoder.encode(token_ids)
    model = SiglipTextModel if "fixed" in name or not name.startswith("siglip2") else Siglip2TextModel
    with torch.inference_mode():
        unpadded = model.from_pretrained(checkpoints[name]).eval()(input_ids=torch.tensor(token_ids))
    assert not torch.allclose(encoding.tokens, unpadded.last_hidden_state, atol=0.05)
    assert not torch.allclose(encoding.pooled, unpadded.pooler_output, atol=0.05)
    assert encoding.tokens.shape[1] == len(token_ids[0])


def test_a_clip_checkpoint_of_old_pools_at_end_of_text_whatever_its_tokenizer_pads_with(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    model = CLIPTextModelWithProjection.from_pretrained(checkpoints["clip-tower"])
    tokenizer = make_clip_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = 2
    model.save_pretrained(old)
    tokenizer.save_pretrained(old)
    encoder = load(old)
    token_ids = encoder.tokenize(PROMPTS)
    assert tokenizer.pad_token_id > tokenizer.eos_token_id == token_ids[0][-1]
    expected = CLIPTextModelWithProjection.from_pretrained(old).eval()
    encoding = encoder.encode(token_ids)
    for row, ids in enumerate(token_ids):
        with torch.inference_mode():
            output = expected(input_ids=torch.tensor([ids]))
        torch.testing.assert_close(encoding.pooled[row], output.text_embeds[0], rtol=0, atol=2e-5)
        own = encoding.tokens[row][encoding.mask[row]]
        torch.testing.assert_close(own, output.last_hidden_state[0], rtol=0, atol=2e-5)


def test_the_padding_side_of_a_tokenizer_matters_to_siglip_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, matters in (("clip", False), ("bert", False), ("siglip2", True)):
        turned = copy_of(checkpoints[name], tmp_path, name)
        change_json(turned / "tokenizer_config.json", lambda config: config.update(padding_side="left"))
        encoder, before = load(turned), load(checkpoints[name])
        token_ids = encoder.tokenize(["the red dog", "a"])
        encoding, other = encoder.encode(token_ids), before.encode(token_ids)
        same = torch.equal(encoding.pooled, other.pooled) and torch.equal(encoding.tokens, other.tokens)
        assert same == (not matters)
        assert (fingerprint(encoder.identity) == fingerprint(before.identity)) == (not matters)


def test_a_whole_bert_with_another_head_gives_its_tower(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(checkpoints["bert"], tmp_path)
    tower = BertModel.from_pretrained(folder)
    model = BertForMaskedLM(tower.config)
    model.bert = tower
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"bert", "cls"}
    loaded, before = load(folder), load(checkpoints["bert"])
    token_ids = loaded.tokenize(PROMPTS)
    assert_same(loaded.encode(token_ids), before.encode(token_ids), atol=0)


def test_encoders_are_frozen(encoders: dict[str, HubTextEncoder]) -> None:
    for encoder in encoders.values():
        encoding = encoder.encode(encoder.tokenize(["red"]))
        assert not encoding.tokens.requires_grad
        assert not encoding.pooled.requires_grad


# Tokens


@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_are_cut_before_the_tokens_at_their_end(encoders: dict[str, HubTextEncoder], name: str) -> None:
    encoder = encoders[name]
    empty, short, long = encoder.tokenize(["", "a dog", "a dog" + " red" * 100])
    assert encoder.max_length == len(long) == LIMIT
    assert long[-1] == short[-1] == empty[-1]
    assert long[: len(short) - 1] == short[:-1]


@pytest.mark.parametrize(("says", "limit"), [(10, 10), (10**30, LIMIT)])
@pytest.mark.parametrize("name", ["clip", "siglip2", "bert"])
def test_the_lower_of_the_models_and_the_tokenizers_limit_holds(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, says: int, limit: int
) -> None:
    checkpoint = copy_of(checkpoints[name], tmp_path)
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(model_max_length=says))
    encoder = load(checkpoint)
    assert encoder.max_length == limit
    assert [len(ids) for ids in encoder.tokenize(["the dog " * 20])] == [limit]
    assert encoder.identity["tokenizer"]["max_length"] == limit


@pytest.mark.parametrize("name", PADDED)
def test_siglip_does_not_tell_upper_from_lower_case(encoders: dict[str, HubTextEncoder], name: str) -> None:
    upper, lower = encoders[name].tokenize(["The RED Dog É", "the red dog é"])
    assert upper == lower
    assert encoders[name].identity["tokenizer"]["lower_case"] is True


@given(prompt=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aredDOGΣİ ,.!")), max_size=30))
@settings(deadline=None, max_examples=150)
def test_gemmas_tokenizer_is_made_to_do_what_that_of_siglip_2_does(
    encoders: dict[str, HubTextEncoder], prompt: str
) -> None:
    expected = make_gemma_tokenizer(Siglip2Tokenizer)(prompt, truncation=True, max_length=LIMIT)["input_ids"]
    for name in ("siglip2-fixed", "siglip2"):
        assert encoders[name].tokenize([prompt]) == [expected]


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("clip", "siglip", "siglip2", "bert")])
@given(prompt=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aredDOGΣİ ,.!")), max_size=30))
@settings(deadline=None, max_examples=100)
def test_any_text_becomes_the_tokens_that_its_own_tokenizer_makes_of_it(
    own_tokenizers: dict[str, PreTrainedTokenizerBase], encoders: dict[str, HubTextEncoder], name: str, prompt: str
) -> None:
    expected = own_tokenizers[name](prompt, truncation=True, max_length=LIMIT)["input_ids"]
    assert encoders[name].tokenize([prompt]) == [expected]


@pytest.fixture(scope="module")
def own_tokenizers(checkpoints: dict[str, Path]) -> dict[str, PreTrainedTokenizerBase]:
    return {name: AutoTokenizer.from_pretrained(path) for name, path in checkpoints.items()}


@needs_sentencepiece
def test_the_first_siglip_drops_punctuation(encoders: dict[str, HubTextEncoder]) -> None:
    plain, punctuated = encoders["siglip"].tokenize(["the red dog", "The, red: dog!? "])
    assert plain == punctuated


@needs_sentencepiece
def test_the_first_siglip_is_lower_cased_also_where_its_tokenizer_says_otherwise(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], tmp_path: Path
) -> None:
    checkpoint = copy_of(checkpoints["siglip"], tmp_path)
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(do_lower_case=False))
    assert load(checkpoint).tokenize(["The RED dog"]) == encoders["siglip"].tokenize(["the red dog"])


# Refusals


def test_there_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no encoder at .*nowhere: there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has model type None; text encoders are clip"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"no encoder 'no-one/no-model': there is no such folder, and the hub"):
        load_text_encoder(TextEncoderSpec("no-one/no-model"))


def test_a_model_of_another_family_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    Dinov2Config().save_pretrained(tmp_path)
    known = "clip, clip_text_model, siglip, siglip_text_model, siglip2, siglip2_text_model, bert"
    with pytest.raises(UsageError, match=f"has model type 'dinov2'; text encoders are {known}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "weight", "model"),
    [
        ("clip-tower", "text_projection.weight", "CLIPTextModelWithProjection"),
        ("siglip2-fixed", "text_model.head.bias", "SiglipTextModel"),
        ("bert", "pooler.dense.weight", "BertModel"),
    ],
)
def test_a_checkpoint_that_lacks_what_pools_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, weight: str, model: str
) -> None:
    checkpoint = copy_of(checkpoints[name], tmp_path)
    change_weights(checkpoint, lambda weights: weights.pop(weight))
    with pytest.raises(UsageError, match=f"lacks 1 weights that {model} needs"):
        load(checkpoint)


@pytest.mark.parametrize("gone", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
@pytest.mark.parametrize("name", ["clip", "clip-tower", "siglip2-fixed", "siglip2", "siglip2-tower", "bert"])
def test_a_checkpoint_without_a_tokenizer_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, gone: tuple[str, ...]
) -> None:
    checkpoint = copy_of(checkpoints[name], tmp_path)
    for file in gone:
        (checkpoint / file).unlink()
    with pytest.raises(UsageError, match="tokenizer") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_no_digest_can_be_made_of_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoints["bert"], tmp_path)
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(tokenizer_class="ByT5Tokenizer"))
    with pytest.raises(UsageError, match=r"has a ByT5Tokenizer, which cannot be loaded from a tokenizer\.json"):
        load(checkpoint)


@pytest.mark.parametrize("harm", ["cut short", "no tokenizer at all", "a class that needs a missing package"])
def test_a_damaged_tokenizer_is_said_in_one_sentence(checkpoints: dict[str, Path], tmp_path: Path, harm: str) -> None:
    checkpoint = copy_of(checkpoints["bert"], tmp_path)
    if harm == "cut short":
        (checkpoint / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes()[:-100])
    elif harm == "no tokenizer at all":
        change_json(checkpoint / "tokenizer.json", lambda content: content.pop("pre_tokenizer"))
        change_json(checkpoint / "tokenizer.json", lambda content: content.update(post_processor={"type": "?"}))
    else:
        (checkpoint / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n")
        settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
        change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(settings))
    with pytest.raises(UsageError, match=r"the tokenizer of .* cannot be loaded \(.+\)\.$") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = copy_of(checkpoints["bert"], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(checkpoint)
    num_embeddings = BertModel.from_pretrained(checkpoint).config.vocab_size
    with pytest.raises(UsageError, match=f"token ids up to {num_embeddings}, .* has {num_embeddings} token embeddings"):
        load(checkpoint)


def test_a_siglip_tokenizer_without_a_padding_token_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoints["siglip2"], tmp_path)
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(pad_token=None))
    with pytest.raises(UsageError, match=r"has no padding token"):
        load(checkpoint)


def test_a_tokenizer_that_gives_an_empty_prompt_no_token_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = copy_of(checkpoints["siglip2"], tmp_path)
    make_gemma_tokenizer(Siglip2Tokenizer, add_eos_token=False).save_pretrained(checkpoint)
    with pytest.raises(UsageError, match=r"adds no end token; set add_eos_token in tokenizer_config\.json"):
        load(checkpoint)


def test_code_that_comes_with_a_checkpoint_is_not_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoints["bert"], tmp_path)
    (checkpoint / "mine.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Mine: ...\n")
    change_json(checkpoint / "config.json", lambda config: config.update(auto_map={"AutoModel": "mine.Mine"}))
    mine = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"}
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(mine))
    load(checkpoint)
    assert not (tmp_path / "was run").exists()


# Adapters


@torch.no_grad()
def save_adapter(checkpoint: Path, name: str, folder: Path, seed: int = 0) -> Any:
    """Save a LoRA adapter for one of the towers alone; returns PEFT's own model, not merged."""
    model = {"bert": BertModel, "clip-tower": CLIPTextModelWithProjection}.get(name, Siglip2TextModel)
    targets = ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what its next version will not have
        adapted = get_peft_model(model.from_pretrained(checkpoint).eval(), LoraConfig(r=2, target_modules=targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("name", ["clip-tower", "siglip2", "bert"])
def test_an_adapter_gives_the_features_that_peft_gives_and_stands_in_the_identity_beside_the_weights(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], tmp_path: Path, name: str
) -> None:
    adapted = save_adapter(checkpoints[name], name, tmp_path / "adapter")
    encoder = load(checkpoints[name], adapter=str(tmp_path / "adapter"))
    assert (encoder.name, encoder.adapter) == (str(checkpoints[name]), str(tmp_path / "adapter"))
    token_ids = encoder.tokenize(PROMPTS)
    encoding = encoder.encode(token_ids)
    with torch.inference_mode():
        output = adapted(**inputs_by_transformers(checkpoints[name], name, PROMPTS))
    pooled = output.text_embeds if name == "clip-tower" else output.pooler_output
    torch.testing.assert_close(encoding.pooled, pooled, rtol=0, atol=1e-4)
    for row, ids in enumerate(token_ids):
        own = output.last_hidden_state[row, : len(ids)]
        torch.testing.assert_close(encoding.tokens[row, : len(ids)], own, rtol=0, atol=1e-4)
    plain = encoders[name].encode(token_ids)
    assert not torch.allclose(encoding.pooled, plain.pooled, atol=0.01)
    save_adapter(checkpoints[name], name, tmp_path / "other", seed=1)
    other = load(checkpoints[name], adapter=str(tmp_path / "other")).identity
    moved = load(checkpoints[name], adapter=str(copy_of(tmp_path / "adapter", tmp_path))).identity
    assert encoder.identity == moved
    assert encoder.identity | {"adapter": None} == other | {"adapter": None} == encoders[name].identity
    assert len({encoder.identity["adapter"], other["adapter"], None}) == 3


def test_an_adapter_of_another_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(checkpoints["bert"], "bert", tmp_path / "adapter")
    with pytest.raises(UsageError, match="adapter"):
        load(checkpoints["siglip2"], adapter=str(tmp_path / "adapter"))
    with pytest.raises(UsageError, match="adapter"):
        load(checkpoints["bert"], adapter=str(tmp_path / "nowhere"))


# Identity


@pytest.mark.parametrize("name", NAMES)
def test_the_same_checkpoint_has_the_same_identity_wherever_it_lies_and_however_it_was_used(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], tmp_path: Path, name: str
) -> None:
    moved = load(copy_of(checkpoints[name], tmp_path, "elsewhere"))
    moved.encode(moved.tokenize(PROMPTS))
    assert moved.identity == encoders[name].identity
    assert b"elsewhere" not in canonical_json(moved.identity)
    assert fingerprint(json.loads(json.dumps(moved.identity))) == fingerprint(moved.identity)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_decides_the_features_changes_the_identity(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], tmp_path: Path, name: str
) -> None:
    changed = {"float16": load(checkpoints[name], precision="float16")}
    changed["bfloat16"] = load(checkpoints[name], precision="bfloat16")
    for what in ("weights", "config", "tokenizer", "limit", "truncation"):
        checkpoint = copy_of(checkpoints[name], tmp_path, what)
        if what == "weights":
            change_weights(checkpoint, lambda weights: [tensor.mul_(1.0001) for tensor in weights.values()])
        elif what == "config":
            change_json(checkpoint / "config.json", lambda config: config.update(initializer_factor=0.5))
        elif what == "tokenizer":
            change_vocabulary(checkpoint)
        elif what == "limit":
            change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(model_max_length=9))
        else:
            change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(truncation_side="left"))
        changed[what] = load(checkpoint)
    identities = {"before": encoders[name], **changed}
    assert len({fingerprint(encoder.identity) for encoder in identities.values()}) == len(identities)


def change_vocabulary(checkpoint: Path) -> None:
    """Let a tokenizer cut words in another way, with the ids that it had."""
    if (checkpoint / "tokenizer.json").is_file():
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_bytes())
        if "merges" in tokenizer["model"]:
            tokenizer["model"]["merges"].pop()
        else:
            vocabulary = tokenizer["model"]["vocab"]
            vocabulary["red"], vocabulary["dog"] = vocabulary["dog"], vocabulary["red"]
        (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        (path,) = checkpoint.glob("spiece.model")
        path.write_bytes(path.read_bytes().replace("▁red".encode(), "▁rod".encode()))


def test_a_model_saved_in_many_files_has_the_same_identity(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    split = copy_of(checkpoints["siglip2"], tmp_path)
    (split / "model.safetensors").unlink()
    Siglip2Model.from_pretrained(checkpoints["siglip2"]).save_pretrained(split, max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 3
    assert load(split).identity["weights"] == load(checkpoints["siglip2"]).identity["weights"]


def test_names_paths_and_versions_inside_a_config_are_left_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoints["clip"], tmp_path)
    incidentals = {"_name_or_path": "elsewhere/model", "torch_dtype": None, "transformers_version": "4.0.0"}
    change_json(checkpoint / "config.json", lambda config: config.update(incidentals))
    change_json(checkpoint / "config.json", lambda config: config["text_config"].update(incidentals))
    assert load(checkpoint).identity == load(checkpoints["clip"]).identity


@pytest.mark.parametrize("name", NAMES)
def test_an_identity_names_the_class_of_the_tower(
    checkpoints: dict[str, Path], encoders: dict[str, HubTextEncoder], name: str
) -> None:
    classes = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
    model_type = json.loads((checkpoints[name] / "config.json").read_bytes())["model_type"]
    assert encoders[name].identity["class"] == {**classes, "bert": "BertModel"}[model_type.removesuffix("_text_model")]


def test_every_family_that_is_offered_is_tested_here(encoders: dict[str, HubTextEncoder]) -> None:
    assert {encoder.identity["config"]["model_type"] for encoder in encoders.values()} == TEXT_FAMILIES.keys()


def test_a_clip_model_may_say_the_width_of_its_projection_once_for_both_towers(
    tmp_path: Path,
) -> None:
    tokenizer = make_clip_tokenizer()
    tower = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**tower, **ends, "num_attention_heads": 2, "projection_dim": 24},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    del published["text_config"]["projection_dim"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    encoder = load_text_encoder(TextEncoderSpec(str(tmp_path)))
    assert encoder.pooled_width == 24
    assert encoder.encode(encoder.tokenize(["a dog"])).pooled.shape == (1, 24)
