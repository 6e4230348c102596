"""What flux2-ds runs beside training."""
