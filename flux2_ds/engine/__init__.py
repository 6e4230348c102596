"""DeepSpeed lives here."""
