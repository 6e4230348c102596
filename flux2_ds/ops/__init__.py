"""Autograd operators and Triton kernels. Imports torch alone."""
