"""What an export says of itself, in files and on the hub."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors import safe_open
from test_export import Write, export_as, recipe_for, save, trained

from flux2_ds.checkpoint.manager import STATE_NAME, Checkpoint
from flux2_ds.commands.export import Request, export, main
from flux2_ds.commands.model_card import Origin
from flux2_ds.config.model_spec import RELEASED, Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError

TOKEN = "hf_" + "s" * 34


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    return recipe_for(tiny_model, tmp_path / "cats", "dora")


@pytest.fixture
def chosen(recipe: Recipe, tiny_spec: Spec, write_checkpoint: Write) -> Checkpoint:
    return save(trained(recipe, tiny_spec), recipe, write_checkpoint)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_user_interfaces_find_what_was_trained(
    recipe: Recipe, chosen: Checkpoint, tiny_model: Path, tiny_spec: Spec
) -> None:
    plain, comfyui = export_as(recipe, chosen, title="My cat")
    assert "modelspec.trigger_phrase" not in metadata_of(comfyui)
    state = json.loads((chosen.path / STATE_NAME).read_text())
    words = {"me": "ohwx cat", "web": "", "more": "ohwx cat", "dog": "sks"}
    state["recipe"]["captions"] = {"trigger_word": words}
    (chosen.path / STATE_NAME).write_text(json.dumps(state))
    export_as(recipe, chosen)
    assert metadata_of(comfyui)["modelspec.trigger_phrase"] == "ohwx cat, sks"
    assert "Write `ohwx cat, sks` in the prompt." in (comfyui.parent / "README.md").read_text()
    plain, comfyui = export_as(recipe, chosen, title="My cat", trigger="ohwx cat")
    found = metadata_of(comfyui)
    expected = {
        "modelspec.architecture": f"Flux.2-{tiny_spec.variant}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": "My cat",
        "modelspec.trigger_phrase": "ohwx cat",
        "modelspec.resolution": "1024x1024",
        "ss_output_name": comfyui.stem,
        "ss_sd_model_name": tiny_model.name,
        "ss_base_model_version": f"flux_2_{tiny_spec.variant}",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_steps": "7",
        "ss_timestep_sampling": "flux",
        "flux2_ds.samples_seen": "56",
        "flux2_ds.data": "0123abcd",
    }
    assert expected.items() <= found.items()
    assert json.loads(found["flux2_ds.lora"])["alpha"] == 6.0
    assert json.loads(found["ss_network_args"]) == {"use_dora": True}
    assert str(tiny_model.parent) not in json.dumps(found), "a path says who trained"
    content = comfyui.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert found["sshs_model_hash"] == digest
    assert found["modelspec.hash_sha256"] == f"0x{digest}"
    assert metadata_of(plain)["modelspec.implementation"].endswith("/diffusers")


@pytest.mark.parametrize("tiny_model", ["klein"], indirect=True)
def test_an_export_is_the_same_bytes_again(recipe: Recipe, chosen: Checkpoint) -> None:
    first = [path.read_bytes() for path in export_as(recipe, chosen)]
    assert first == [path.read_bytes() for path in export_as(recipe, chosen)]


@pytest.mark.parametrize("tiny_model", ["klein"], indirect=True)
@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        ("black-forest-labs/FLUX.2-dev", "Flux.2-dev"),
        ("black-forest-labs/FLUX.2-klein-base-9B", "Flux.2-klein-9b"),
        ("black-forest-labs/FLUX.2-klein-4B", "Flux.2-klein-4b"),
    ],
)
def test_released_models_have_the_names_that_others_use(
    chosen: Checkpoint, model: str, architecture: str
) -> None:
    folder = Path("/cache/models--x/snapshots/0123abcd")
    origin = Origin(chosen, "trained", RELEASED[model], folder, "cat")
    assert (origin.architecture, origin.revision) == (architecture, "0123abcd")


def test_a_model_card_says_how_each_file_is_used(
    recipe: Recipe, chosen: Checkpoint, tiny_spec: Spec, tiny_model: Path
) -> None:
    Image.new("RGB", (8, 8)).save(Path(recipe.run_dir) / "previews.png")
    request = Request(dtype=torch.float32, trigger="ohwx cat", repository="me/cats")
    exports, card = export(recipe, chosen, request)
    assert [path.name for path in card] == ["README.md", "previews.png"]
    text = card[0].read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == tiny_model.name and front["instance_prompt"] == "ohwx cat"
    assert "lora" in front["tags"]
    assert "](previews.png)" in text and "models/loras" in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert f'load_lora_weights("me/cats", weight_name="{exports[0].path.name}")' in code
    assert tiny_spec.pipeline in code and "ohwx cat, a photograph" in code
    assert all(export.path.name in text for export in exports)
    assert str(tiny_model.parent) not in text


@pytest.mark.parametrize("tiny_model", ["klein"], indirect=True)
def test_the_card_of_a_full_fine_tune_loads_its_directory(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Write
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "cats", "full")
    chosen = save(trained(recipe, tiny_spec), recipe, write_checkpoint)
    _, (card,) = export(recipe, chosen, Request(dtype=torch.float32))
    code = card.read_text().split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert '".", subfolder="transformer"' in code


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files uses; the server keeps what came in."""

    def do_GET(self) -> None:
        self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server: Any = self.server
        server.calls.append((self.path, body))
        if "preupload" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        url = f"http://{self.headers['Host']}/me/cats"
        return self._answer({"url": url, "commitUrl": f"{url}/commit/1", "commitOid": "1"})

    def _answer(self, value: Any) -> None:
        server: Any = self.server
        if self.headers["Authorization"] != f"Bearer {TOKEN}" or server.refuses:
            self.send_response(401)
            value = {"error": "Invalid username or password."}
        else:
            self.send_response(200)
        text = json.dumps(value).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.calls, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(
    recipe: Recipe, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """The command, with the hub on this machine."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    file = tmp_path / "recipe.yaml"
    values = {
        "run_dir": recipe.run_dir, "method": recipe.method, "precision": "fp32",
        "model": {"path": recipe.model.path}, "data": {"images": "x", "shards": "x"},
        "lora": dataclasses.asdict(recipe.lora),
    }  # fmt: skip
    file.write_text(yaml.safe_dump(values))
    monkeypatch.setattr("sys.argv", ["export", "--config", str(file), "--push", "me/cats"])
    return main


@pytest.mark.parametrize("tiny_model", ["klein"], indirect=True)
def test_an_export_is_pushed_with_the_users_token(
    recipe: Recipe,
    chosen: Checkpoint,
    hub: Any,
    push: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    push()
    (created,) = [json.loads(body) for path, body in hub.calls if path.endswith("/create")]
    assert (created["name"], created["visibility"]) == ("cats", "private")
    (commit,) = [body for path, body in hub.calls if "/commit/" in path]
    lines = [json.loads(line) for line in commit.decode().splitlines()]
    files = {line["value"]["path"] for line in lines if line["key"] == "file"}
    exported = {path.name for path in (Path(recipe.run_dir) / "export").iterdir()}
    assert files == exported and "README.md" in files and len(files) == 3
    printed = "".join(capfd.readouterr())
    assert "pushed to" in printed and "for ComfyUI" in printed
    assert TOKEN not in caplog.text + printed
    assert not any(TOKEN.encode() in body for _, body in hub.calls)


@pytest.mark.parametrize("tiny_model", ["klein"], indirect=True)
@pytest.mark.parametrize("reason", ["no token", "wrong token", "no hub"])
def test_nothing_is_written_for_a_hub_that_does_not_take_it(
    recipe: Recipe,
    chosen: Checkpoint,
    hub: Any,
    push: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    hub.refuses = reason == "wrong token"
    if reason == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if reason == "no hub":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"--push.*hf auth") as error:
        push()
    assert TOKEN not in str(error.value)
    assert not (Path(recipe.run_dir) / "export").exists()
