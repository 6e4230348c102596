"""Where and how a recipe runs. Imports no torch, so that it answers at once."""
