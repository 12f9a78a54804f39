"""The population of portraits: what comes with the package, how it was made, and that plain diffusers draws it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffcore.adapters import write_adapter
from diffcore.io import artifact
from diffcore.models import DiffusionModel
from diffcore.noise import row_noise
from diffcore.zoo.portraits.people import select
from w2w_space.files.population import PopulationFolder
from w2w_space.files.portraits import store_portraits, write_portraits
from w2w_space.portraits import (
    ATTRIBUTES,
    MEMBERS,
    PROMPT,
    RECIPE,
    SCHEMA,
    background_mask,
    drawing_options,
    load_portraits,
    load_portraits_base,
    load_portraits_oracle,
    portrait_instances,
    portrait_labels,
    portrait_people,
    portrait_pictures,
    train_portraits,
)
from w2w_space.recipe import layout_for
from w2w_space.render import render_vectors
from w2w_space.scaling import scaling
from w2w_space.train_population import Trained


@pytest.fixture(scope="module")
def base() -> DiffusionModel:
    return load_portraits_base()


def test_persons_are_balanced_and_stored_with_their_members(base: DiffusionModel):
    population, labels = load_portraits()
    people = portrait_people()
    assert torch.equal(labels.values, portrait_labels(people)[:MEMBERS].double())
    assert labels.attributes == tuple(ATTRIBUTES)
    assert population.layout == layout_for(base, RECIPE.targets, RECIPE.rank)
    assert len(population) == MEMBERS
    assert people["hat"].bincount().tolist() == [128, 64, 64]
    assert people["style"].bincount().tolist() == [64] * 4
    assert not bool(((people["gender"] == 0) & (people["beard"] > 0)).any())
    apart = torch.corrcoef(labels.values.T).abs()
    places = [labels.attributes.index(name) for name in ("hat", "glasses", "dark skin", "man")]
    assert float((apart[places][:, places] - torch.eye(4)).max()) < 0.2


def test_members_that_failed_are_not_stored(base: DiffusionModel, tmp_path: Path):
    size = layout_for(base, RECIPE.targets, RECIPE.rank).size
    members = [
        Trained(name, torch.full((size,), value), loss, 1.0, torch.zeros(1), failed=loss != loss)
        for name, value, loss in (("one", 1.0, 0.5), ("two", 2.0, float("nan")), ("three", 3.0, 0.25))
    ]
    labels = torch.arange(3.0)[:, None].expand(3, len(ATTRIBUTES))
    path = store_portraits(base, members, labels, tmp_path / "members.safetensors")
    stored = artifact.load(path, schema=SCHEMA)
    assert stored.fields["names"] == ["one", "three"]
    assert stored.tensors["labels"][:, 0].tolist() == [0, 2]
    assert stored.tensors["vectors"][:, 0].tolist() == [1, 3]
    assert stored.fields["loss"] == 0.375


def test_pictures_show_their_persons_and_seeds_show_them_anew():
    people = select(portrait_people(), slice(24))
    pictures = portrait_pictures(people, 2)
    oracle = load_portraits_oracle()
    scores = oracle(pictures.flatten(0, 1)).unflatten(0, (24, 2)).mean(1)
    truth = portrait_labels(people)
    for place, name in enumerate(ATTRIBUTES):
        if name != "dark skin":
            assert float(((scores[:, place] > 0.5) == (truth[:, place] > 0.5)).float().mean()) > 0.8, name
    again = portrait_pictures(people, 2, seed=1)
    assert (again - pictures).abs().mean() > 0.05
    mask = background_mask()
    assert 0.1 < float(mask.mean()) < 0.5
    assert not mask[12:20, 12:20].any()


def test_members_draw_their_persons(base: DiffusionModel):
    population, labels = load_portraits()
    some = torch.linspace(0, MEMBERS - 1, 16).long().tolist()
    drawn = render_vectors(base, population.layout, population.vectors.rows(some), **drawing_options(2))
    scores = load_portraits_oracle()(drawn.flatten(0, 2)).unflatten(0, (16, 2)).mean(1)
    truth = labels.values[some]
    right = ((scores > 0.5) == (truth > 0.5)).double().mean(0)
    names = list(labels.attributes)
    assert float(right[names.index("hat")]) >= 0.8
    assert float(right[names.index("glasses")]) >= 0.7
    skin = names.index("dark skin")
    assert float(torch.corrcoef(torch.stack([scores[:, skin], truth[:, skin]]))[0, 1]) > 0.9
    plain = render_vectors(base, population.layout, torch.zeros(1, population.layout.size), **drawing_options(2))
    assert (drawn - plain).abs().mean() > 0.05


def test_weights_carry_the_attributes():
    population, labels = load_portraits()
    found = scaling(population, labels, [MEMBERS - 48], held_out=48, parts=1, num_components=40)[0].r2[0]
    told = dict(zip(labels.attributes, found.tolist(), strict=True))
    assert told["dark skin"] > 0.4
    assert told["hat"] > 0.4


def test_plain_diffusers_draws_a_member(base: DiffusionModel, tmp_path: Path):
    """Written as an ordinary LoRA and loaded by `load_lora_weights`, a member draws what our rendering draws."""
    population, _ = load_portraits()
    vector = population.vectors.rows([5])[0]
    path = write_adapter(population.layout.adapter(vector, "person"), tmp_path / "person.safetensors")
    pipeline = base.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    try:
        noise = row_noise(0, range(2), base.shape)
        options = {"num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "pt"}
        theirs: Tensor = pipeline([PROMPT] * 2, latents=noise, **options).images
    finally:
        pipeline.unload_lora_weights()
    ours = render_vectors(base, population.layout, vector[None], prompts=[PROMPT], seeds=range(2), steps=8)[0, 0]
    without = render_vectors(base, population.layout, 0 * vector[None], prompts=[PROMPT], seeds=range(2), steps=8)[0, 0]
    assert (theirs - ours).abs().max() < 0.02
    assert (without - ours).abs().max() > 0.2


def test_training_starts_where_the_stored_members_did(base: DiffusionModel):
    members, labels = train_portraits(base, count=2, recipe=replace(RECIPE, steps=3, warmup=1))
    assert labels.shape == (2, len(ATTRIBUTES))
    assert all(member.gain > 0 for member in members)
    population, _ = load_portraits()
    stored = population.vectors.rows([0, 1])
    for own, found in zip(stored, members, strict=True):
        assert float(torch.nn.functional.cosine_similarity(found.vector.float(), own, dim=0)) > 0.3


def test_instances_are_ten_pictures_of_one_person_with_the_prompt_of_all(base: DiffusionModel):
    one, other = portrait_instances(base, select(portrait_people(), slice(2)))
    assert len(one) == 10
    assert one.name == "person-000"
    assert torch.equal(one.condition["encoder_hidden_states"], other.condition["encoder_hidden_states"])
    assert not torch.equal(one.x0, other.x0)


def test_the_population_is_written_for_build_with_its_labels(base: DiffusionModel, tmp_path: Path):
    found = write_portraits(base, tmp_path / "portraits")
    assert len(found) == MEMBERS
    opened = PopulationFolder.open(tmp_path / "portraits").population()
    stored, labels = load_portraits()
    assert torch.equal(opened.vectors.rows([7]), stored.vectors.rows([7]))
    lines = (tmp_path / "portraits" / "labels.csv").read_text().splitlines()
    assert lines[0].split(",") == ["adapter", *labels.attributes]
    assert [float(value) for value in lines[8].split(",")[1:]] == pytest.approx(labels.values[7].tolist())
