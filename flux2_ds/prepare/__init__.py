"""Photographs and captions in, WebDataset shards of latents and text embeddings out."""
