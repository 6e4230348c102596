"""The FLUX.2 model: files, transformer, text, latents, tiny models."""
