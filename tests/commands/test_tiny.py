"""Tiny model directories: the true pipelines load them, and everything follows from the seed."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from factories import load_pipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from flux2_ds.commands import tiny
from flux2_ds.config.model_spec import read_spec
from flux2_ds.errors import UserError

VARIANTS = ("klein", "dev")
PARTS = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both variants, each twice with seed 0 and once with seed 1: {variant: [a, b, other]}."""
    root = tmp_path_factory.mktemp("tiny")
    directories = {}
    for variant in VARIANTS:
        directories[variant] = [root / f"{variant}_{name}" for name in ("a", "b", "other")]
        for directory, seed in zip(directories[variant], (0, 0, 1), strict=True):
            tiny.make_tiny(directory, variant, seed=seed)
    return directories


@pytest.fixture(scope="module", params=VARIANTS)
def pipeline(request, made):
    """What diffusers itself loads.

    dev's processor is left out and the tokenizer put in its place, because transformers offers
    PixtralProcessor only beside torchvision.
    """
    directory = made[request.param][0]
    name = json.loads((directory / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(directory, tokenizer=None)
    pipeline.tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("variant", "pipeline_class", "processor"),
    [
        ("klein", "Flux2KleinPipeline", "Qwen2Tokenizer"),
        ("dev", "Flux2Pipeline", "PixtralProcessor"),
    ],
)
def test_directory_is_a_complete_one_of_the_variant(made, variant, pipeline_class, processor):
    directory = made[variant][0]
    index = json.loads((directory / "model_index.json").read_text())
    assert index["_class_name"] == pipeline_class
    assert index["tokenizer"] == ["transformers", processor]
    assert {path.name for path in directory.iterdir() if path.is_dir()} == PARTS == PARTS & {*index}
    assert index.get("is_distilled") is (False if variant == "klein" else None)
    weights = {path.parent.name for path in directory.rglob("*.safetensors")}
    assert weights == {"transformer", "vae", "text_encoder"}
    assert not [*directory.rglob("*.bin"), *directory.rglob("*.pt")]
    assert sum(map(len, contents(directory).values())) < 20e6
    spec = read_spec(directory)
    assert (spec.variant, spec.pipeline) == (variant, pipeline_class)


def test_default_prompt_encoding_is_three_hidden_states_of_512_tokens(pipeline):
    config = pipeline.text_encoder.config.get_text_config()
    with torch.no_grad():
        embeddings, ids = pipeline.encode_prompt(["a red cat", "a mountain"])
    assert embeddings.shape == (2, 512, 3 * config.hidden_size)
    assert ids.shape == (2, 512, 4)
    assert pipeline.transformer.config.joint_attention_dim == embeddings.shape[-1]
    assert embeddings.isfinite().all()
    assert not torch.equal(embeddings[0], embeddings[1])
    states = embeddings.unflatten(-1, (3, -1))
    assert not torch.allclose(states[:, :, 0], states[:, :, 1], rtol=0.1)
    # The encoder's last state is the normalised one; no stacked state may be that.
    assert config.num_hidden_layers > (30 if config.model_type == "mistral" else 27)


def test_pads_are_on_the_side_of_the_real_model(pipeline):
    tokenizer = pipeline.tokenizer
    batch = tokenizer(["cat"], padding="max_length", max_length=8, return_tensors="pt")
    klein = isinstance(pipeline, diffusers.Flux2KleinPipeline)
    assert batch.attention_mask[0, 0 if klein else -1] == 1
    assert batch.input_ids[0, -1 if klein else 0] == tokenizer.pad_token_id
    assert tokenizer.pad_token == ("<|endoftext|>" if klein else "<pad>")


def test_klein_template_closes_an_empty_thought(made):
    tokenizer = AutoTokenizer.from_pretrained(made["klein"][0] / "tokenizer")
    messages = [{"role": "user", "content": "a cat"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    thinking = tokenizer.apply_chat_template(messages, **render)
    silent = tokenizer.apply_chat_template(messages, enable_thinking=False, **render)
    assert thinking == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    assert silent == thinking + "<think>\n\n</think>\n\n"
    assert len(tokenizer.encode("<|im_start|><think></think><|im_end|>")) == 4


def test_dev_template_keeps_the_system_message_and_starts_once(made):
    tokenizer = AutoTokenizer.from_pretrained(made["dev"][0] / "tokenizer")
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("system", "You are\nan AI."), ("user", "a cat"))
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>[SYSTEM_PROMPT]You are\nan AI.[/SYSTEM_PROMPT][INST]a cat[/INST]"
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer.apply_chat_template(messages, return_dict=False)
    )
    for special in ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"):
        assert tokens.count(special) == 1


def test_any_text_survives_the_tokenizer(pipeline):
    text = "OPEN: a façade 🐈 in 漢字,\n\ttwice  spaced"
    assert pipeline.tokenizer.decode(pipeline.tokenizer.encode(text)) == text


def test_a_image_is_sampled(pipeline):
    pictures = [
        pipeline(
            prompt="a red cat",
            height=64,
            width=128,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed in (0, 0, 1)
    ]
    first, again, other = (np.asarray(picture) for picture in pictures)
    assert first.shape == (64, 128, 3)
    assert first.std() > 1
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_loaded_one_by_one_encode_alike(made, variant):
    directory = made[variant][0]
    ours = load_pipeline(directory, read_spec(directory), torch.float32)
    theirs = getattr(diffusers, read_spec(directory).pipeline).from_pretrained(
        directory, tokenizer=None
    )
    theirs.tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    with torch.no_grad():
        assert torch.equal(ours.encode_prompt("a cat")[0], theirs.encode_prompt("a cat")[0])
    for part in ("transformer", "vae"):
        mine, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_transformer_passes_order_one_and_gradients_to_every_weight(pipeline):
    transformer = pipeline.transformer
    generator = torch.Generator().manual_seed(0)
    width = transformer.config.joint_attention_dim
    tokens = torch.randn(2, 16, 128, generator=generator)
    text = torch.randn(2, 8, width, generator=generator)
    output = transformer(
        hidden_states=tokens,
        encoder_hidden_states=text,
        timestep=torch.tensor([0.2, 0.8]),
        guidance=torch.ones(2) if transformer.config.guidance_embeds else None,
        img_ids=pipeline._prepare_latent_ids(torch.zeros(2, 128, 4, 4)),
        txt_ids=pipeline._prepare_text_ids(text),
    ).sample
    assert 0.1 < output.std() < 10
    transformer.zero_grad()
    output.square().mean().backward()
    for name, weight in transformer.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_bytes(made, variant):
    one, two, other = (contents(directory) for directory in made[variant])
    assert one == two
    assert one.keys() == other.keys()
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {name for name in one if name.endswith(".safetensors")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_latent_statistics_are_not_the_default_ones(made, variant):
    weights = load_file(made[variant][0] / "vae" / "diffusion_pytorch_model.safetensors")
    mean, variance = weights["bn.running_mean"], weights["bn.running_var"]
    assert mean.shape == variance.shape == (128,)
    assert mean.abs().mean() > 0.1
    assert 0.5 <= variance.min() < 0.7 < 1.8 < variance.max() <= 2


def test_callers_randomness_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    tiny.make_tiny(tmp_path / "model", "klein", seed=3)
    assert torch.equal(torch.rand(4), expected)


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"--out .* is not empty"):
        tiny.make_tiny(tmp_path, "klein")
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_the_command_makes_one_in_an_empty_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiny", "--out", str(tmp_path), "--seed", "0"])
    tiny.main()
    assert "FLUX.2-klein" in capsys.readouterr().out
    assert read_spec(tmp_path).variant == "klein"
