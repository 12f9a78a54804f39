"""Which of several weight files of a folder are loaded: those that the libraries load themselves."""

import copy

import pytest
import torch

from diffcore.checkpoint.component import read_component
from diffcore.checkpoint.stored import stored_in
from diffcore.checkpoint.walk import walk
from diffcore.testing import tiny

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SHARDS = {"unet": "1MB", "vae": "100KB", "text_encoder": "40KB"}


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline("sd15")


def with_shards(module, folder, variant, size):
    """Writes a module whole, and another version of it in shards beside it."""
    module.save_pretrained(folder, variant=variant)
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data += 1
    elsewhere = folder.with_name("elsewhere")
    other.save_pretrained(elsewhere, variant=variant, max_shard_size=size)
    moved = [path.rename(folder / path.name) for path in elsewhere.iterdir() if path.name != "config.json"]
    assert len(moved) > 2


@pytest.mark.parametrize("part", STEMS)
@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
@pytest.mark.parametrize("spelling", ["of today", "of old"])
def test_of_shards_beside_a_whole_file_the_librarys_choice_is_taken(pipeline, tmp_path, part, variant, spelling):
    module, folder = getattr(pipeline, part), tmp_path / part
    with_shards(module, folder, variant, SHARDS[part])
    if spelling == "of old" and variant:
        index = folder / f"{STEMS[part]}.safetensors.index.{variant}.json"
        index.rename(folder / f"{STEMS[part]}.safetensors.{variant}.index.json")
    kind = type(module)
    theirs = kind.from_pretrained(folder, variant=variant, local_files_only=True, use_safetensors=True).state_dict()
    library = kind.__module__.partition(".")[0]
    found = read_component(folder, walk(folder), part, library, kind.__name__)
    stored = stored_in(found.weights, folder)
    ours = dict(stored.read(stored.shapes))
    assert found.variant == variant
    assert len(found.weights) > 1 or library == "transformers"
    plain = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    assert theirs.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in theirs.items())
