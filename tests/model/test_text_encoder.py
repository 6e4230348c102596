"""Captions become what the pipelines' own `encode_prompt` makes of them: nothing lost, nothing ours."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from factories import rendered

from flux2_ds.config.model_spec import Spec
from flux2_ds.errors import UserError
from flux2_ds.model import text_encoder
from flux2_ds.model.pipeline import load_text_pipeline
from flux2_ds.model.text_encoder import TextEncoder, read_prompt

CAPTIONS = ["A cat on a red mat.", "", "[IMG] An old lighthouse at dusk, seen from the sea."]


@pytest.fixture(scope="module")
def encoder(tiny_model: Path, tiny_spec: Spec) -> TextEncoder:
    return TextEncoder(tiny_model, tiny_spec, torch.float32, torch.device("cpu"))


def hidden_states(pipeline, spec: Spec, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and stacked hidden states by a forward pass of our own over rendered text."""
    side, layers = ("right", (9, 18, 27)) if spec.variant == "klein" else ("left", (10, 20, 30))
    tokenizer = pipeline.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:512]
    pad = [tokenizer.pad_token_id] * (512 - len(ids))
    mask = [1] * len(ids)
    none = [0] * len(pad)
    row = torch.tensor([ids + pad if side == "right" else pad + ids])
    seen = torch.tensor([mask + none if side == "right" else none + mask])
    with torch.no_grad():
        output = pipeline.text_encoder(
            input_ids=row, attention_mask=seen, output_hidden_states=True, use_cache=False
        )
    return row, torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)


def test_embeddings_are_those_of_the_written_out_prompt(
    encoder: TextEncoder, tiny_model: Path, tiny_spec: Spec
) -> None:
    pipeline = load_text_pipeline(tiny_model, tiny_spec, torch.float32)
    found = encoder.encode(CAPTIONS)
    assert found.shape == (3, 512, tiny_spec.text_width)
    for row, caption in enumerate(CAPTIONS):
        _, expected = hidden_states(pipeline, tiny_spec, rendered(tiny_spec, caption))
        torch.testing.assert_close(found[row], expected[0], rtol=1e-4, atol=1e-4)


def test_nothing_is_trimmed_or_masked_out(encoder: TextEncoder) -> None:
    """All 512 positions, padding too, hold the encoder's output: the transformer attends to them."""
    short, long = encoder.encode(["A cat.", "A cat. " * 400])
    for embedding in (short, long):
        assert embedding.abs().amax(dim=-1).min() > 0
    assert not torch.equal(short, long)


def test_batching_changes_nothing(encoder: TextEncoder) -> None:
    together = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(
            together[row], encoder.encode([caption])[0], rtol=1e-5, atol=1e-5
        )


def wider(model: Path, spec: Spec, directory: Path) -> Path:
    """A directory with the model's tokenizer and a text encoder whose every linear nf4 can hold."""
    config = transformers.AutoConfig.from_pretrained(model / "text_encoder")
    for part in (config.get_text_config(), getattr(config, "vision_config", config)):
        part.hidden_size, part.intermediate_size, part.head_dim = 64, 128, 32
    encoder = getattr(transformers, spec.text_encoder)(config)
    encoder.save_pretrained(directory / "text_encoder")
    for name in ("tokenizer", "model_index.json"):
        (directory / name).symlink_to(model / name)
    return directory


@pytest.mark.parametrize("wide", [False, True])
def test_nf4_leaves_what_it_cannot_hold(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, wide: bool, caplog: pytest.LogCaptureFixture
) -> None:
    directory = wider(tiny_model, tiny_spec, tmp_path) if wide else tiny_model
    encoder, plain = (
        TextEncoder(directory, tiny_spec, torch.bfloat16, torch.device("cpu"), quantization)
        for quantization in ("nf4", None)
    )
    held, left = set(), set()
    for name, module in encoder._pipeline.text_encoder.named_modules():
        if isinstance(module, Linear4bit):
            held.add(name)
            stored = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain._pipeline.text_encoder.get_submodule(name).weight.data = stored
        elif isinstance(module, torch.nn.Linear):
            left.add(name)
    assert {name.rpartition(".")[2] for name in held} >= {"down_proj"}
    assert (left == {"lm_head"}) == wide == ("linears stay unquantized" not in caplog.text)
    expected = plain.encode(CAPTIONS).float()
    difference = encoder.encode(CAPTIONS).float() - expected
    # Thirty random layers make 0.3 % of a product's rounding as much; over weights of their own, 1.
    assert difference.norm() < 0.15 * expected.norm()


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, model)
    for part, file, names in (
        ("text_encoder", "config.json", {"AutoConfig": "own.Config", "AutoModel": "own.Model"}),
        ("tokenizer", "tokenizer_config.json", {"AutoTokenizer": ["own.Tokenizer", None]}),
    ):
        (model / part / "own.py").write_text(f"open({str(ran)!r}, 'w')")
        path = model / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for quantization in ("nf4", None):
        encoder = TextEncoder(model, tiny_spec, torch.float32, torch.device("cpu"), quantization)
    expected = TextEncoder(tiny_model, tiny_spec, torch.float32, torch.device("cpu"))
    assert torch.equal(encoder.encode(CAPTIONS), expected.encode(CAPTIONS))
    # A class that transformers does not have, so that there is nothing but the model's own code.
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("Qwen2Tokenizer", "OwnTokenizer"))
    (model / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        TextEncoder(model, tiny_spec, torch.float32, torch.device("cpu"))
    assert not ran.exists()


def test_a_template_that_does_not_end_is_refused(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    loop = "".join(f"{{% for x{n} in range(99999) %}}" for n in range(3)) + "{% endfor %}" * 3
    for path in (tmp_path / "model" / "tokenizer").glob("*.jinja"):
        path.write_text(loop)
    monkeypatch.setattr(text_encoder, "_TEMPLATE_LIMIT", 0.3)
    for read in (
        lambda: TextEncoder(tmp_path / "model", tiny_spec, torch.float32, torch.device("cpu")),
        lambda: read_prompt(tmp_path / "model", tiny_spec, "a cat"),
    ):
        with pytest.raises(UserError, match=r"tokenizer cannot be loaded .* longer than 0.3 s"):
            read()
