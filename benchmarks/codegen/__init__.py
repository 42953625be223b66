"""The CUDA programs, compiled without a device: `python -m benchmarks.codegen`. Nothing runs; see `pretend`.

Start reading at `programs.generate`, then `launches` and `machine`.
"""
