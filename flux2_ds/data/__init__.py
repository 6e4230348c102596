"""Photographs, buckets, shards, order, loader."""
