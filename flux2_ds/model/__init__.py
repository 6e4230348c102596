"""FLUX.2 from diffusers: how it is built, loaded, adapted and run; text, latents, flow matching."""
