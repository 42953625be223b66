"""How far cached images are from uncached ones, and from the data, at what cost: `python -m benchmarks.fidelity`."""
