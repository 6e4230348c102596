"""The report of a run: what a page says, what it survives, and how it looks in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Batch, Data, Launch, Log, Model, Preview, Recipe, recipe_values
from flux2_ds.run.metrics import Metrics
from flux2_ds.run.report import PLAN, read_run, write_page, write_report

ROOT = Path(__file__).parents[2]
SIGNED = "https://store.example/s?X-Amz-Signature=abc"
LOG = """\
== 2026-03-01 23:58:00 process 7 on node01
23:58:01 variant    FLUX.2-klein, 2 double + 3 single blocks
{plan}
23:58:02 parameters 247,808 trained
23:58:03 training
  on      2 × NVIDIA H100, ZeRO stage 2
23:59:59 warning: step 2: previews of 64x64 cannot be made (disk full); training goes on
00:00:30 stopped by SIGTERM after step 20
== 2026-03-02 08:00:00 process 9 on node01
08:00:05 continuing after step 20 from run/checkpoints/step_00000020
08:10:00 memory     peak 20.0 GiB, predicted 21.0 GiB (+5 %)
08:09:59 warning: of another thread
08:10:01 done in 0:10:01
"""


def write_run(root: Path, name: str = "cats", steps: int = 40, **changes: Any) -> Path:
    """A run as training leaves it, started in `root`, and its shards."""
    recipe = Recipe(
        run_dir=f"runs/{name}",
        steps=steps,
        model=Model(path="models/klein"),
        data=Data(images="photos", shards="shards"),
        batch=Batch(global_size=4),
        preview=Preview(every=10, prompts=["a cat", "<script>alert(1)</script>"]),
        launch=Launch(accelerator="cpu"),
        **changes,
    )
    run, shards = root / recipe.run_dir, root / "shards"
    for folder in (run / "logs", run / "export", run / "samples", shards / "contact_sheets"):
        folder.mkdir(parents=True, exist_ok=True)
    for step in (20, 40):
        (run / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_values(recipe), sort_keys=False))
    (run / "versions.json").write_text('{"torch": "2.13.0"}')
    plan = "\n".join(f"23:58:01 {line}" for line in make_plan(recipe, 1).lines())
    (run / "logs/rank_0.log").write_text(LOG.format(plan=plan))
    (run / "logs/rank_1.log").write_text("== 2026-03-01 23:58:00 process 8 on node02\n"
                                         f"23:59:00 warning: {SIGNED}: next try in 2 s\n")  # fmt: skip
    for rank, host in enumerate(("node01", "node02")):
        (run / f"logs/rank_{rank}.json").write_text(json.dumps({"host": host, "ended": True}))
    metrics = Metrics(run, Log(wandb="disabled"), config={}, resumed_at=0)
    for step in range(1, steps + 1):
        held_out = {"validation/loss": 0.9 - step / 100} if step % 20 == 0 else {}
        loss = None if step == 3 else 1 / step
        smoothed = metrics.smoothed(loss)
        metrics.write(step, {"train/loss": loss, "train/loss_smoothed": smoothed,
                             "train/learning_rate": 1e-4, "perf/seconds_per_step": 2.0,
                             "perf/forward_seconds": 0.5, "perf/backward_seconds": 1.4,
                             "perf/samples_per_second": 2.0, "data/bucket": "64x64",
                             "data/epoch": step / 4, "optim/skipped_steps": int(step > 3),
                             **held_out})  # fmt: skip
    metrics.close()
    for step in range(0, steps + 1, 2):
        (run / f"previews/step_{step:08d}").mkdir(parents=True)
        for prompt in (0, 1):
            color = (6 * step, 100, 100 * prompt)
            Image.new("RGB", (64, 64), color).save(run / f"previews/step_{step:08d}/{prompt}.png")
    Image.new("RGB", (90, 60), "green").save(run / "samples/step_00000040.png")
    header = json.dumps({"__metadata__": {"flux2_ds.checked_for": "ComfyUI"}}).encode()
    (run / "export/cats.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    Image.new("RGB", (120, 90), "white").save(shards / "contact_sheets/64x64.jpg")
    report = {"samples": 9, "held_out": 1, "texts": 7, "buckets": {"64x64": 8, "96x48": 1},
              "skipped": {"b.jpg": "unreadable: truncated"}, "notes": {"a large crop": {"c.jpg": "41%"}}}  # fmt: skip
    (shards / "report.json").write_text(json.dumps(report))
    return run


def text_of(page: Path) -> str:
    """What a reader sees, tags and script left out."""
    body = re.sub(r"(?s)<(style|script).*?</\1>", "", page.read_text())
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_page_says_what_happened(tmp_path):
    run = write_run(tmp_path)
    assert write_report(run) == run / "report.html"
    text = text_of(run / "report.html")
    for said in (
        "LoRA of rank 32 on models/klein, 9 samples FLUX.2-klein, 2 double",
        "finished, 40 steps",
        "best held-out loss 0.5000 at step 40",
        "time in steps 0:01:20",
        "hardware 2 × NVIDIA H100",
        "peak memory 20.0 GiB a GPU",
        "memory a GPU 21.0 GiB peak 20.0 GiB (+5% predicted)",
        "40 = 160 samples 40 steps, 160 samples, 10 epochs",
        "stop 1 skipped",
        "every 500 steps and at the end there are: 20, 40",
        "batch 4 global = 1 micro × 4 accumulation × 1 process",
        "a cat step 0 step 40 step 0 step 4 step 8",  # before and after, then the strip
        "9 samples, of which 1 are held out, 7 different captions",
        "96x48 1",
        "1 skipped b.jpg unreadable: truncated",
        "c.jpg 41%",
        "Mar 01, 23:58:00 started on node01",
        "Mar 01, 23:59:59 step 2: previews of 64x64 cannot be made",
        "Mar 02, 00:00:30 stopped by SIGTERM after step 20",  # past midnight
        "Mar 02, 08:00:00 started again on node01",
        "Mar 02, 08:00:05 continuing after step 20",
        "Mar 02, 08:09:59 of another thread",  # which is a moment late, not on the next day
        "Mar 02, 08:10:01 done in 0:10:01",
        "rank 1: https://store.example/s next try in 2 s",
        "batch.global_size 4 8",
        "export/cats.safetensors 0.0 MB ComfyUI",
        "ranks 2 on node01, node02",
        "torch 2.13.0",
    ):
        assert said in text, said
    assert text.index("steps 40 1000") < text.index("settings at their defaults")


def test_runs_beside_each_other(tmp_path):
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", steps=20, seed=7)
    text = text_of(write_page([one, other], tmp_path / "both.html"))
    assert "2 runs compared" in text
    assert "one/runs/cats finished, 40 steps" in text and "other/runs/cats finished, 20 " in text
    differing = text[text.index("Settings that differ") :]
    assert "seed 0 7" in differing and "steps 40 20" in differing
    assert not re.search("lora|run_dir", differing)
    assert "a cat one/runs/cats step 0 step 40 other/runs/cats step 0 step 20" in text


def test_a_running_run_says_so(tmp_path):
    run = write_run(tmp_path)
    recipe = (run / "recipe.yaml").read_text().replace("steps: 40", "steps: 50")
    (run / "recipe.yaml").write_text(recipe)
    assert read_run(run).status == "stopped after 40 of 50 steps"
    heartbeat = run / "logs/rank_0.json"
    heartbeat.write_text(json.dumps({"ended": False}))
    assert read_run(run).status == "running, 40 of 50 steps"
    assert 'http-equiv="refresh"' in write_report(run).read_text()
    os.utime(heartbeat, (0, 0))
    assert read_run(run).status == "stopped after 40 of 50 steps"
    assert 'http-equiv="refresh"' not in write_report(run).read_text()


def test_what_strangers_wrote_is_text_and_secrets_are_left_out(tmp_path):
    page = write_report(write_run(tmp_path)).read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert "https://store.example/s next" in page and "Signature" not in page


@pytest.mark.parametrize(
    ("damaged", "content", "written"),
    [
        ("recipe.yaml", "- a list", False),
        ("recipe.yaml", "preview: 3\ndata: x\n", False),
        ("metrics.jsonl", "{\n", True),
        ("metrics.jsonl", "", True),
        ("versions.json", "[", True),
        ("logs/rank_0.json", "[]", True),
        ("logs/rank_0.log", "== yesterday\n12:00\n", True),
        ("previews/step_00000000/0.png", "cut", True),
        ("export/cats.safetensors", "cut", True),
        ("../../shards/report.json", "[" * 100_000, True),
    ],
)
def test_a_damaged_file_ends_no_training(tmp_path, caplog, damaged, content, written):
    run = write_run(tmp_path)
    (run / damaged).write_text(content)
    assert write_report(run) == (run / "report.html" if written else None)
    assert ("report.html cannot be written" in caplog.text) == (not written)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("training/lifecycle.py", '"memory     peak %.1f GiB, predicted %.1f GiB'),
        ("training/build.py", '"parameters %s trained"'),
        ("training/build.py", '"blocks     %d of'),
        ("training/inputs.py", '"variant    {inputs.spec}"'),
        ("training/inputs.py", '"data       %s in %s'),
        ("training/inputs.py", '"held out   %s"'),
        ("training/checkpoints.py", '"continuing after step %d from'),
        ("train.py", '"stopped by %s after step'),
        ("training/lifecycle.py", '"%s in %s", "done"'),
        ("run/watchdog.py", "process {os.getpid()} on {socket.gethostname()}"),
    ],
)
def test_the_lines_that_it_looks_for_are_logged(module, line):
    assert line in (ROOT / "flux2_ds" / module).read_text()
    assert all(len(name) <= 10 for name in PLAN)


class Browser:
    """Chromium without a window, spoken to by WebDriver."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        wanted = {
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": arguments},
        }
        session = self.call("", capabilities={"alwaysMatch": wanted})
        self._root += f"/{session['sessionId']}"

    def call(self, path: str, **values: Any) -> Any:
        request = urllib.request.Request(
            self._root + path, json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **params: Any) -> Any:
        return self.call("/goog/cdp/execute", cmd=command, params=params)

    def run(self, script: str) -> Any:
        return self.call("/execute/sync", script=script, args=[])

    def open(self, page: Path, width: int, scheme: str) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=844,
                      deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)
        self.call("/url", url=f"file://{page}")
        deadline = time.monotonic() + 30
        charts = "const all = [...document.querySelectorAll('[data-chart]')];" \
                 "return all.length > 0 && all.every(chart => chart.querySelector('path'))"  # fmt: skip
        while not self.run(charts):
            assert time.monotonic() < deadline, "charts are not drawn"
            time.sleep(0.1)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.call("/se/log", type="browser")]


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromedriver") is None:
        pytest.skip("needs Debian's chromium-driver")
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        try:
            for line in driver.stdout:
                if started := re.search(r"started successfully on port (\d+)", line):
                    break
            yield Browser(int(started[1]))
        finally:
            driver.terminate()


@pytest.mark.parametrize(
    ("width", "scheme", "several"),
    [(1280, "light", False), (390, "dark", False), (1280, "dark", True), (390, "light", True)],
)
def test_in_a_browser(browser, tmp_path, width, scheme, several):
    runs = [write_run(tmp_path / name, f"a_rather_long_name_of_the_run_{name}") for name in "ab"]
    page = write_page(runs if several else runs[:1], tmp_path / "page.html")
    browser.open(page, width, scheme)
    assert browser.console() == []
    assert browser.run("return document.documentElement.scrollWidth") == width
    images = "return [...document.querySelectorAll('main img')]"
    assert browser.run(f"{images}.length") >= 8
    assert browser.run(f"{images}.every(image => image.complete && image.naturalWidth > 0)")
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")
    asked = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert all(name.startswith("data:") for name in browser.run(asked))
    # A point under the mouse is read out; an image opens large, and closes.
    browser.run("document.querySelector('[data-large]').scrollIntoView({block: 'center'})")
    key = "return document.querySelector('[data-large] .key b').textContent"
    before = browser.run(key)
    x, y, wide, high = browser.run(
        "const box = document.querySelector('[data-large] svg').getBoundingClientRect();"
        "return [box.x, box.y, box.width, box.height]"
    )
    browser.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x + wide / 3, y=y + high / 2)
    assert browser.run(key) != before
    browser.run("document.querySelector('main img').click()")
    assert browser.run("return document.querySelector('dialog').open")
    browser.run("document.querySelector('dialog img').click()")
    assert not browser.run("return document.querySelector('dialog').open")
    shot = browser.devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    assert base64.b64decode(shot).startswith(b"\x89PNG")
