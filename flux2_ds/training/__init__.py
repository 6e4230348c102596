"""The parts that train.py puts together."""
