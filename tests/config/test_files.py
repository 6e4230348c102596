"""What is said of a model that the hub does not serve, and which files a model has."""

import os

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flux2_ds.config import model_files as files
from flux2_ds.errors import UserError, without_secrets


def test_where_the_hub_sends_us_is_said_without_its_signature(monkeypatch):
    def fails(*_, **__):
        raise LocalEntryNotFoundError(
            "Client error '403 Forbidden' for url 'https://cdn/x.safetensors?Signature=secret'\nmore"
        )

    monkeypatch.setattr(files, "snapshot_download", fails)
    with pytest.raises(UserError, match=r"'nobody/x' .* '403 Forbidden' for url") as caught:
        files.model_directory("nobody/x", None, [])
    assert "'https://cdn/x.safetensors'. Check the path" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("url=URL('http://h/a?b=c&d=%20')", "url=URL('http://h/a')"),
        ("(http://h/a?b) and s3://b/c?d, e?", "(http://h/a) and s3://b/c e?"),
        ("is it a question? no", "is it a question? no"),
        ("at https://user:p@host/x, no", "at https://host/x, no"),
        ("HTTPS://token@host/a and s3://me:p/w:@x@host/a", "HTTPS://host/a and s3://host/a"),
        ("https://h/a;sig=x and http://h/#token=x", "https://h/a and http://h/"),
        ("http://h:80/a@2 sftp://me@h/b https://h/c; next", "http://h:80/a@2 sftp://me@h/b https://h/c; next"),
    ],
)  # fmt: skip
def test_secrets_are_cut(text, expected):
    assert without_secrets(text) == expected == str(UserError(text))


def test_files_of_a_known_size_and_time_are_not_read_again(tmp_path):
    file = tmp_path / "a.safetensors"

    def write(content: bytes, time: int) -> None:
        file.write_bytes(content)
        os.utime(file, ns=(time, time))

    write(b"weights", 5)
    known = files.file_digests(tmp_path)
    write(b"Weights", 5)
    assert files.file_digests(tmp_path, known) == known
    assert files.changed_files(known, files.file_digests(tmp_path)) == [file.name]
    write(b"Weights", 6)
    assert files.changed_files(known, files.file_digests(tmp_path, known)) == [file.name]
    write(b"weights", 7)
    assert files.changed_files(known, files.file_digests(tmp_path, known)) == []
