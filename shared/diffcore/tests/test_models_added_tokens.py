"""Tokens that somebody added to a tokenizer: the ids and states of the libraries, or a refusal; never pieces."""

import json
import shutil

import diffusers
import pytest
import torch
from tokenizers import AddedToken
from transformers import CLIPTokenizer, T5Tokenizer

from diffcore import Runtime
from diffcore.checkpoint.component import read_component
from diffcore.checkpoint.fingerprint import fingerprint
from diffcore.checkpoint.inventory import Inventory
from diffcore.checkpoint.tokenizers import build_tokenizer
from diffcore.checkpoint.walk import walk
from diffcore.errors import IncompatibleModelError
from diffcore.models import load
from diffcore.testing import tiny
from diffcore.testing.checkpoints import single_file

CPU = Runtime(device="cpu")
TOKENS = {
    "plain": "<cat-toy>",
    "capital letters": "<CatToy>",
    "capital letters as written": AddedToken("<CatToy>", normalized=False),
    "special": AddedToken("<cat-toy>", special=True),
    "special with capital letters": AddedToken("<CatToy>", special=True, normalized=False),
    "of another class": "<extra_id_0>",
    "blanks inside": "cat toy",
    "blanks inside, as written": AddedToken("my  Cat", normalized=False),
    "swallows blanks on its left": AddedToken("<cat-toy>", lstrip=True),
    "swallows blanks on its right": AddedToken("<cat-toy>", rstrip=True),
    "a whole word": AddedToken("toy", single_word=True),
    "a word": "toy",
    "an accent": AddedToken("caf\u00e9", normalized=True),
}
ONCE = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
SETTINGS = {"model_max_length": 77, "pad_token": "<|endoftext|>"}
PROMPTS = [
    "a <cat-toy> on a table",
    "a<cat-toy>b, <cat-toy>",
    "a <CatToy> <cattoy> <CATTOY>!",
    "my  Cat, my cat, a cat toy, a cattoy, a Cat  Toy",
    "toys and a toy",
    "a Cafe\u0301 and a caf\u00e9",
    "none of them, <extra_id_0>",
    "<cat-toy> " * 60,
]


def saved(folder, *tokens):
    """Writes a tiny CLIP tokenizer with added tokens."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


def component(folder, kind="CLIPTokenizer"):
    return read_component(folder, walk(folder), "tokenizer", "transformers", kind)


def ours(folder, kind="CLIPTokenizer"):
    return build_tokenizer(component(folder, kind))


def grown(name, *tokens):
    """Returns a tiny pipeline whose tokenizers of CLIP got tokens, and its text encoders a row for each."""
    pipeline = tiny.pipeline(name)
    for number, part in enumerate(part for part in ("tokenizer", "tokenizer_2") if hasattr(pipeline, part)):
        grow(
            getattr(pipeline, part), getattr(pipeline, part.replace("tokenizer", "text_encoder")), *tokens, seed=number
        )
    return pipeline


def grow(tokenizer, encoder, *tokens, seed=0):
    tokenizer.add_tokens(list(tokens))
    old = encoder.config.vocab_size
    rows = max(old, len(tokenizer))
    encoder.resize_token_embeddings(rows, mean_resizing=False)
    new = torch.randn(rows - old, encoder.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    encoder.get_input_embeddings().weight.data[old:] = new


def in_two_files(folder):
    """Rewrites a tokenizer's folder as it was written until 2025; returns the added tokens by number."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return {str(token.pop("id")): token for token in whole["added_tokens"]}


def same_ids(folder, tokenizer, kind=CLIPTokenizer):
    theirs = kind.from_pretrained(folder, local_files_only=True)
    assert tokenizer(PROMPTS).input_ids == theirs(PROMPTS).input_ids
    return theirs


@pytest.mark.parametrize("name", TOKENS)
def test_ids_are_those_of_transformers(tmp_path, name):
    theirs = same_ids(saved(tmp_path, TOKENS[name]), ours(tmp_path))
    assert any(514 in ids for ids in theirs(PROMPTS).input_ids)  # the row is in use at all


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("way", ["listed", "numbered", "numbered and special"])
def test_ids_are_those_of_transformers_in_older_folders(tmp_path, name, way):
    folder = saved(tmp_path, TOKENS[name], AddedToken("<another>", special=True))
    tokens = in_two_files(folder)
    numbers = {token["content"]: int(number) for number, token in tokens.items() if int(number) >= 514}
    if way == "listed":
        (folder / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, "added_tokens_decoder": tokens}))
    if way == "numbered and special":
        special = {"additional_special_tokens": list(numbers), "bos_token": {"content": "<|startoftext|>"}}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps(numbers))
    same_ids(folder, ours(folder))


def test_what_is_named_special_without_a_number_comes_last(tmp_path):
    saved(tmp_path, "<one>", "<two>")
    edited_list(tmp_path, lambda tokens: tokens.pop())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"extra_special_tokens": ["<two>"]}))
    theirs = same_ids(tmp_path, ours(tmp_path))
    assert ours(tmp_path)("<two>").input_ids == theirs("<two>").input_ids == [512, 515, 513]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_states_are_those_of_the_pipeline_with_placeholders_of_several_vectors(tmp_path, name):
    tokens = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<one>", "<Big>", "<Big>_1"]
    grown(name, *tokens).save_pretrained(tmp_path)
    kind = diffusers.StableDiffusionPipeline if name == "sd15" else diffusers.StableDiffusionXLPipeline
    pipeline = kind.from_pretrained(tmp_path, local_files_only=True)
    model = load(tmp_path, CPU)
    for prompt in ("a <cat-toy> on <one>", "<Big> and <big>, <cat-toy>,<cat-toy>", "<cat-toy>_1 alone", "nothing"):
        with torch.no_grad():
            theirs = pipeline.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        found = model.prompts([prompt])
        assert torch.equal(found["encoder_hidden_states"], theirs[0]), prompt
        if name == "sdxl":
            assert (found["text_embeds"] - theirs[2]).abs().max() < 1e-5, prompt
    ids = model.prompts.tokenize(["a <cat-toy>"]).ids
    assert [row[0, 2:6].tolist() for row in ids] == [[514, 515, 516, 513]] * len(ids)


def test_states_are_those_of_a_pipeline_that_loaded_learned_vectors(tmp_path):
    pipeline = tiny.pipeline("sd15")
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    pipeline.load_textual_inversion({"<thing>": vectors})
    pipeline.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(
            "a <thing>", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    assert torch.equal(load(tmp_path, CPU).prompts(["a <thing>"])["encoder_hidden_states"], theirs)


def test_a_t5_has_its_added_tokens_and_keeps_its_own(tmp_path):
    tokenizer = tiny.t5_tokenizer()
    tokenizer.add_tokens([AddedToken("<cat-toy>", normalized=False), "toy"])
    tokenizer.save_pretrained(tmp_path)
    theirs = same_ids(tmp_path, ours(tmp_path, "T5Tokenizer"), T5Tokenizer)
    assert 130 in theirs(PROMPTS[0]).input_ids
    assert ours(tmp_path, "T5Tokenizer")("a <extra_id_3> b").input_ids == theirs("a <extra_id_3> b").input_ids


def test_placeholders_are_no_families_where_the_pipeline_takes_none(tmp_path):
    """SD3's and PixArt's pipelines leave `<toy>` alone; so do we."""
    pipeline = tiny.pipeline("pixart")
    grow(pipeline.tokenizer, pipeline.text_encoder, "<toy>", "<toy>_1")
    pipeline.save_pretrained(tmp_path)
    ids = load(tmp_path, CPU).prompts.tokenize(["<toy>"]).ids[0][0]
    assert ids[:2].tolist() == [130, 1]


def test_single_files_take_added_tokens_from_the_folder_that_is_named(tmp_path):
    pipeline = tiny.pipeline("sd15", width=768)
    grow(pipeline.tokenizer, pipeline.text_encoder, "<cat-toy>")
    pipeline.save_pretrained(tmp_path / "like")
    file = single_file(pipeline, tmp_path / "model.safetensors", "sd15")
    folder = shutil.copytree(tmp_path / "like" / "tokenizer", tmp_path / "words")
    model = load(file, CPU, like=tmp_path / "like")
    same_ids(folder, model.modules["tokenizer"])
    same_ids(folder, load(file, CPU, like=tmp_path / "like", tokenizer=folder).modules["tokenizer"])
    with torch.no_grad():
        ids = pipeline.tokenizer([PROMPTS[0]], padding="max_length", max_length=77, return_tensors="pt").input_ids
        states = pipeline.text_encoder(ids)[0]
    assert (model.prompts(PROMPTS[:1])["encoder_hidden_states"] - states).abs().max() < 1e-4


def test_a_tokenizer_with_the_padding_of_another_family_is_padded_as_asked(tmp_path):
    tiny.tokenizer("!").save_pretrained(tmp_path)
    tokenizer = build_tokenizer(component(tmp_path), pad_token="<|endoftext|>")
    assert tokenizer.pad_token_id == 513
    assert tokenizer("a!").input_ids == tiny.tokenizer()("a!").input_ids  # "!" is no mark of this family


def edited_list(folder, change):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    change(whole["added_tokens"])
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tokens: tokens[-1].update(id=520), "with the number 520, to which transformers gives 514"),
        (lambda tokens: tokens[-1].update(id=-1), "the number -1"),
        (lambda tokens: tokens[-1].update(content=7), "adds the token '7', which is no text"),
        (lambda tokens: tokens[-1].update(content=""), "which is no text of 1 to 512 characters"),
        (lambda tokens: tokens[-1].update(content="\ud83e"), "which is no text"),
        (lambda tokens: tokens[-1].update(lstrip="yes"), "neither true nor false"),
        (lambda tokens: tokens.append({**tokens[-1], "id": 515}), "with the number 515"),
    ],
)
def test_impossible_tokens_are_refused(tmp_path, change, reason):
    saved(tmp_path, "<cat-toy>")
    edited_list(tmp_path, change)
    with pytest.raises(IncompatibleModelError, match=reason):
        ours(tmp_path)


@pytest.mark.parametrize("pair", [("<Cat>", "<cat>"), ("a  toy", "a toy"), ("cafe\u0301", "CAF\u00c9")])
def test_tokens_between_which_the_library_draws_are_refused(tmp_path, pair):
    """Of two tokens that are one after normalisation transformers takes now the one, now the other."""
    saved(tmp_path, *pair)
    with pytest.raises(IncompatibleModelError, match="which are one after normalisation"):
        ours(tmp_path)
    shutil.rmtree(tmp_path)
    saved(tmp_path, *(AddedToken(name, normalized=False) for name in pair))
    same_ids(tmp_path, ours(tmp_path))


def test_files_that_number_a_token_differently_are_refused(tmp_path):
    saved(tmp_path, "<cat-toy>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 515}))
    with pytest.raises(IncompatibleModelError, match="numbers the added token '<cat-toy>' 515 and 514"):
        ours(tmp_path)


def test_a_token_beyond_the_rows_of_the_text_encoder_is_refused(tmp_path):
    pipeline = grown("sd15", "<cat-toy>")
    pipeline.tokenizer.add_tokens(["<dog-toy>"])
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(IncompatibleModelError, match="the tokenizer has 516 entries, its text encoder 515"):
        load(tmp_path, CPU)


def test_rows_without_a_token_are_told(tmp_path):
    """The tokenizer that was trained with the text encoder was not saved with it."""
    pipeline = grown("sd15", "<cat-toy>")
    pipeline.tokenizer = tiny.tokenizer()
    pipeline.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="rows for 515 tokens, its tokenizer has 514"):
        load(tmp_path, CPU)


def test_a_token_that_transformers_would_overlook_is_refused(tmp_path):
    saved(tmp_path, "<cat-toy>")
    config = tmp_path / "tokenizer_config.json"
    listed = {"513": {"content": "<|endoftext|>", "special": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"added_tokens_decoder": listed}))
    theirs = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert 514 not in theirs(PROMPTS[0]).input_ids
    with pytest.raises(IncompatibleModelError, match=r"which the tokenizer_config\.json beside it does not list"):
        ours(tmp_path)


def test_fingerprints_tell_added_tokens_apart(tmp_path):
    in_two_files(saved(tmp_path))
    found = set()
    for numbers in ({}, {"<cat-toy>": 514}, {"<dog-toy>": 514}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(numbers))
        found.add(fingerprint(Inventory(tmp_path, "component", "", {"tokenizer": component(tmp_path)})))
    assert len(found) == 3
