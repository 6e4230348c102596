"""`deepspeed ... -m MODULE`, in an environment made from scratch."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher import deepspeed_script
from launcher.doctor import Findings
from launcher.host_checks import check_script

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        ("--num_gpus 8 -m flux2_ds.train --config x", "--num_gpus 8 --module flux2_ds.train --config x"),
        ("-m --num_gpus 8 mod -m 3", "--module --num_gpus 8 mod -m 3"),
        ("--include=localhost:0 train.py -m 3", "--include=localhost:0 train.py -m 3"),
        ("-H hosts --module mod -m", "-H hosts --module mod -m"),
    ],
)  # fmt: skip
def test_m_becomes_module_where_deepspeeds_own_options_stand(monkeypatch, given, handed_on):
    seen = []
    monkeypatch.setattr("deepspeed.launcher.runner.main", lambda: seen.extend(sys.argv[1:]))
    monkeypatch.setattr("sys.argv", ["deepspeed", *given.split()])
    deepspeed_script.main()
    assert seen == handed_on.split()


def deepspeeds_wheel(folder: Path) -> Path:
    """DeepSpeed's scripts as a wheel; the package itself is found where this one finds it."""
    installed = importlib.metadata.distribution("deepspeed")
    script = Path(sys.executable).with_name("ds")
    text = "#!python\n" + script.read_text().partition("\n")[2]
    name = f"deepspeed-{installed.version}"
    files = {f"{name}.data/scripts/{command}": text for command in ("deepspeed", "ds")}
    files |= {
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {installed.version}\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{name}.dist-info/RECORD"] = "".join(f"{file},,\n" for file in files)
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in files.items():
            entry = zipfile.ZipInfo(file)
            entry.external_attr = 0o100755 << 16  # an executable file
            archive.writestr(entry, content)
    return wheel


def test_in_a_new_environment_whichever_is_installed_first(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python, deepspeed = (tmp_path / "env" / "bin" / name for name in ("python", "deepspeed"))
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(found.origin).parents[1]))
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(".*", "tests", "docs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=kept)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{python.parent}:/usr/bin:/bin"}
    for name in ("RANK", "PYTHONPATH"):
        environment.pop(name, None)

    def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        )

    def install(what: Path) -> None:
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall")
        done = run(python, "-m", "pip", "install", *options, what)
        assert done.returncode == 0, done.stderr

    def warnings() -> list[str]:
        findings = Findings()
        check_script(findings)
        return [line.text for line in findings.lines]

    monkeypatch.setenv("PATH", str(deepspeed.parent))
    train = ("-m", "flux2_ds.train", "--config", source / "recipes" / "h100x8.yaml", "--help")
    wheel = deepspeeds_wheel(tmp_path)
    install(wheel)
    install(source)
    started = run(deepspeed, "--num_gpus", "1", *train)
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("usage: flux2_ds.train") == 1
    assert warnings() == []

    install(wheel)  # DeepSpeed once more, for example in another version
    refused = run(deepspeed, "--num_gpus", "1", *train)
    assert refused.returncode == 2 and "unrecognized arguments: -m" in refused.stderr
    assert warnings() == [f"{deepspeed} is not this package's script and takes no -m"]

    install(source)
    assert warnings() == []
    assert "deepspeed.launcher.runner" in deepspeed.with_name("ds").read_text()
