"""Named tensors in safetensors, atomic checkpoints."""
