"""What was asked: recipe, plan, checks. Imports no torch."""
