"""Variables that place a process among others, as a user may set them by hand."""

import socket

import pytest

from flux2_ds.errors import OutageError, UserError
from flux2_ds.run.environment import Ranks, free_host_memory, given_ranks

GOOD = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "node01",
    "MASTER_PORT": "29500",
}


def test_what_launchers_set() -> None:
    assert given_ranks(GOOD) == Ranks(rank=3, local_rank=1, world_size=4)
    for alone in ({}, {"MASTER_PORT": "29511"}, {"WORLD_SIZE": "1"}):
        assert given_ranks(alone) is None


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        *((name, None, "is not set. RANK, .* go together") for name in GOOD),
        ("MASTER_ADDR", "", "is not set"),
        ("RANK", "4", r"is '4'; .* 0 to 3, by WORLD_SIZE\. .* unset RANK and WORLD_SIZE"),
        ("RANK", "-1", "is '-1'; it must be a number"),
        ("LOCAL_RANK", "gpu0", "is 'gpu0'; it must be a number"),
        ("WORLD_SIZE", "0", "is '0'; it must be a number, at least 1"),
        ("WORLD_SIZE", "four", "is 'four'"),
        ("MASTER_PORT", "http", "is 'http'; it must be a port, 1 to 65535"),
        ("MASTER_PORT", "0", "is '0'; it must be a port"),
        ("MASTER_PORT", "65536", "is '65536'; it must be a port"),
    ],
)
def test_what_cannot_be(name: str, given: str | None, message: str) -> None:
    environment = {key: value for key, value in GOOD.items() if key != name}
    if given is not None:
        environment[name] = given
    with pytest.raises(UserError, match=f"the environment variable {name} {message}"):
        given_ranks(environment)


@pytest.mark.parametrize(
    ("line", "tree", "names"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current", "inactive_file")),
        ("9:cpu,memory:/job/step", "memory",
         ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)  # fmt: skip
def test_free_memory_is_that_of_the_narrowest_control_group(tmp_path, line, tree, names):
    top = tmp_path / "sys/fs/cgroup" / tree
    (top / "job/step").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"12:devices:/x\n{line}\n")
    for group, limit in (("job", 1000), ("job/step", "max" if tree == "" else 2**63)):
        for name, text in zip(names, (limit, 300, "memory.stat"), strict=True):
            if name == names[2]:
                (top / group / text).write_text(f"cache 9\n{name} 100\n")
            else:
                (top / group / name).write_text(f"{text}\n")
    assert free_host_memory(tmp_path) == 1000 - (300 - 100)


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch finds it when the first process would listen there."""
    from flux2_ds.distributed import init_process_group  # imports DeepSpeed

    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**here, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        message = rf"127\.0\.0\.1, port {port}, .* MASTER_PORT \(.*EADDRINUSE.*\)\. They must"
        with pytest.raises(OutageError, match=message):
            init_process_group("cpu")
