"""Recognising a model from its JSON files, and refusing what is no FLUX.2."""

import inspect
import json
from pathlib import Path

import pytest
from diffusers import Flux2Transformer2DModel

from flux2_ds.config.model_spec import planned_spec, read_spec, spec_here
from flux2_ds.errors import UserError

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
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({**parts, **(index or {})}))
    (folder / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "Flux2Transformer2DModel", **dimensions, **config})
    )
    return folder


@pytest.mark.parametrize(("variant", "width"), [("dev", 6144), ("klein", 3072)])
def test_dimensions_come_from_the_config(tmp_path, variant, width):
    spec = read_spec(write_model(tmp_path, variant))
    pipeline, (_, encoder), dimensions = MODELS[variant]
    assert spec.text_encoder == encoder
    assert (spec.variant, spec.pipeline, spec.width) == (variant, pipeline, width)
    assert spec.double_blocks == dimensions["num_layers"]
    assert spec.single_blocks == dimensions["num_single_layers"]
    assert spec.text_width == dimensions["joint_attention_dim"]
    assert spec.guidance == (variant == "dev")
    assert f"FLUX.2-{variant}" in str(spec)


KLEIN_ENCODER = MODELS["klein"][1]


@pytest.mark.parametrize(
    ("index", "config", "message"),
    [
        ({"_class_name": "FluxPipeline"}, {}, "holds a FluxPipeline; a Flux2Pipeline"),
        ({"_class_name": None}, {}, "holds a None; a Flux2Pipeline"),
        ({"text_encoder": KLEIN_ENCODER}, {}, "needs a Mistral3ForConditionalGeneration"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, {}, "/vae is a AutoencoderKL; Flux2Pipeline"),
        ({"vae": [None, None]}, {}, "/vae is a None"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, {}, "/scheduler is a DDIMScheduler"),
        ({"vae": None}, {}, "/vae is a None"),
        ({}, {"_class_name": "FluxTransformer2DModel"}, "/transformer is a FluxTransformer2DModel"),
        ({}, {"guidance_embeds": False}, "guidance_embeds is False"),
        *(
            ({}, {"num_layers": wrong}, "num_layers is .*, which no FLUX.2 has")
            for wrong in (10**9, -1, "8", None, [8], 8.0, True)
        ),
        ({}, {"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"is_distilled": True}, {}, r"model\.allow_distilled: true"),
    ],
)
def test_what_is_no_flux2_to_train_is_refused(tmp_path, index, config, message):
    with pytest.raises(UserError, match=message):
        read_spec(write_model(tmp_path, "dev", index, **config))


@pytest.mark.parametrize(("distilled", "allowed"), [(True, True), (False, False)])
def test_base_weights_are_accepted_and_distilled_ones_if_allowed(tmp_path, distilled, allowed):
    folder = write_model(tmp_path, "klein", {"is_distilled": distilled})
    assert read_spec(folder, allow_distilled=allowed).variant == "klein"


def test_a_distilled_model_is_refused_before_it_is_fetched(tmp_path):
    for name in ("klein-4B", "klein-9B"):
        path = f"black-forest-labs/FLUX.2-{name}"
        with pytest.raises(UserError, match=rf"model\.path {path} is step-distilled"):
            spec_here(path, None, allow_distilled=False)
        assert spec_here(path, None, allow_distilled=True) is None
    base = "black-forest-labs/FLUX.2-klein-base-4B"
    assert spec_here(base, None, allow_distilled=False) is None
    for path in ("/no/where", "./models", "a/b/c"):
        with pytest.raises(UserError, match=f"model.path '{path}' is no directory here, and no id"):
            spec_here(path, None, allow_distilled=False)
    here = write_model(tmp_path, "klein")
    assert spec_here(str(here), None, allow_distilled=False) == read_spec(here)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: model.path must be"),
        *((content, "is not valid JSON") for content in ("", '{"_class_name": ')),
        *((content, "must hold a JSON object") for content in ("[]", "3")),
    ],
)
def test_missing_or_damaged_file_is_named(tmp_path, name, content, message):
    folder = write_model(tmp_path, "dev")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} {message}"):
        read_spec(folder)


@pytest.mark.parametrize("dimension", DEV)
def test_a_key_that_a_config_leaves_out_has_the_default_of_diffusers(tmp_path, dimension):
    default = inspect.signature(Flux2Transformer2DModel.__init__).parameters[dimension].default
    assert default == DEV[dimension]
    whole = read_spec(write_model(tmp_path, "dev"))
    path = tmp_path / "transformer" / "config.json"
    path.write_text(path.read_text().replace(f'"{dimension}"', '"other"'))
    assert read_spec(tmp_path) == whole


def test_klein_must_say_that_it_takes_no_guidance(tmp_path):
    folder = write_model(tmp_path, "klein")
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"guidance_embeds"', '"other"'))
    with pytest.raises(UserError, match="guidance_embeds is True"):
        read_spec(folder)


def test_the_size_of_a_model_in_the_hubs_cache_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"in the .* cache.*hf download me/klein$"):
        planned_spec("me/klein")
    cached = tmp_path / "models--me--klein"
    write_model(cached / "snapshots" / "0123", "klein", {"is_distilled": True})
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert planned_spec("me/klein") == planned_spec("black-forest-labs/FLUX.2-klein-base-4B")
    assert spec_here("me/klein", None, allow_distilled=True) == planned_spec("me/klein")
    with pytest.raises(UserError, match=r"model\.path .*klein.* is step-distilled"):
        spec_here("me/klein", None, allow_distilled=False)
    with pytest.raises(UserError, match="hf download"):
        planned_spec("me/klein", "v2")
    with pytest.raises(UserError, match="no directory here"):
        planned_spec("a/b/c")
