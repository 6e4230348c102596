"""flux2-ds: train FLUX.2 (dev, klein) with DeepSpeed from one recipe."""
