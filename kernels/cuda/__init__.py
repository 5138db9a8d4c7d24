"""Kernels in CUDA C++: sources (`*.cuh`), the layouts that they read, and how they are launched.

`device.cuh` is the machine, `unpack.cuh` turns codes into operands of the tensor cores, `decode.cuh` is the product of a
few tokens and a quantized weight, `dequantize.cuh` writes a weight out for many tokens. They are compiled when they are
first used (`infopt.kernels.jit`).
"""
