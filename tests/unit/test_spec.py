"""Recognising a model from its JSON files, and refusing what is no FLUX.2."""

import json
from pathlib import Path

import pytest

from flux2_ds.errors import UserError
from flux2_ds.spec import read_spec

DEV = {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "attention_head_dim": 128,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
MODELS = {
    "dev": ("Flux2Pipeline", ["transformers", "Mistral3ForConditionalGeneration"], DEV),
    "klein": ("Flux2KleinPipeline", ["transformers", "Qwen3ForCausalLM"], KLEIN_4B),
}


def write_model(folder: Path, variant: str, index: dict | None = None, **config: object) -> Path:
    """A directory with the two files that are read; `index` and `config` change them."""
    pipeline, encoder, dimensions = MODELS[variant]
    parts = {
        "_class_name": pipeline,
        "text_encoder": encoder,
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "transformer").mkdir()
    (folder / "model_index.json").write_text(json.dumps({**parts, **(index or {})}))
    (folder / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "Flux2Transformer2DModel", **dimensions, **config})
    )
    return folder


@pytest.mark.parametrize(("variant", "width"), [("dev", 6144), ("klein", 3072)])
def test_dimensions_come_from_the_config(tmp_path, variant, width):
    spec = read_spec(write_model(tmp_path, variant))
    pipeline, _, dimensions = MODELS[variant]
    assert (spec.variant, spec.pipeline, spec.width) == (variant, pipeline, width)
    assert spec.double_blocks == dimensions["num_layers"]
    assert spec.single_blocks == dimensions["num_single_layers"]
    assert spec.text_width == dimensions["joint_attention_dim"]
    assert spec.guidance == (variant == "dev")
    assert f"FLUX.2-{variant}" in str(spec)


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", None])
def test_other_pipelines_are_refused(tmp_path, variant, name):
    with pytest.raises(UserError, match=f"holds a {name}, not FLUX.2"):
        read_spec(write_model(tmp_path, variant, {"_class_name": name}))


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("vae", ["diffusers", "AutoencoderKL"]),
        ("vae", [None, None]),
        ("vae", None),
    ],
)
def test_component_of_another_class_is_named(tmp_path, variant, part, entry):
    with pytest.raises(UserError, match=f"/{part} is a .*; Flux2.*Pipeline needs a "):
        read_spec(write_model(tmp_path, variant, {part: entry}))


def test_text_encoder_of_the_other_variant_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs a Mistral3ForConditionalGeneration"):
        read_spec(write_model(tmp_path, "dev", {"text_encoder": MODELS["klein"][1]}))


def test_transformer_of_another_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="transformer is a FluxTransformer2DModel"):
        read_spec(write_model(tmp_path, "dev", _class_name="FluxTransformer2DModel"))


def test_distilled_weights_are_refused_unless_allowed(tmp_path):
    folder = write_model(tmp_path, "klein", {"is_distilled": True})
    with pytest.raises(UserError, match=r"model\.allow_distilled: true"):
        read_spec(folder)
    assert read_spec(folder, allow_distilled=True).variant == "klein"


def test_base_weights_say_that_they_are_not_distilled(tmp_path):
    assert read_spec(write_model(tmp_path, "klein", {"is_distilled": False})).variant == "klein"


@pytest.mark.parametrize("variant", MODELS)
def test_transformer_of_the_other_variant_is_refused(tmp_path, variant):
    wrong = variant != "dev"
    with pytest.raises(UserError, match=f"guidance_embeds is {wrong}"):
        read_spec(write_model(tmp_path, variant, guidance_embeds=wrong))


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_missing_file_is_named(tmp_path, name):
    folder = write_model(tmp_path, "dev")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} does not exist: model.path must be"):
        read_spec(folder)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("content", ["", '{"_class_name": ', "[]", "3"])
def test_broken_json_is_named(tmp_path, name, content):
    folder = write_model(tmp_path, "dev")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        read_spec(folder)


@pytest.mark.xfail(strict=True, raises=KeyError, reason="a config without a dimension")
def test_config_without_a_dimension_is_refused(tmp_path):
    folder = write_model(tmp_path, "dev")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["num_layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_layers"):
        read_spec(folder)
