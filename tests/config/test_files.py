"""What is said of a model that the hub does not serve."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flux2_ds.config import model_files as files
from flux2_ds.errors import UserError, without_queries


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
    ],
)
def test_queries_are_cut(text, expected):
    assert without_queries(text) == expected
