"""Interpreted kernels take most of the time of these tests."""

from attention_cases import GPU

if not GPU:
    from triton_interpreter import make_faster

    make_faster()
