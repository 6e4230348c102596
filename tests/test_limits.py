"""What docs/limits.md says of a library and no other test holds."""

from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel


def test_the_transformer_cannot_slice_attention() -> None:
    assert hasattr(Flux2KleinPipeline, "enable_attention_slicing")
    assert not hasattr(Flux2Transformer2DModel, "set_attention_slice")
