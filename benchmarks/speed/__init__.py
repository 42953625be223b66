"""Speed of every way to run a UNet: `python -m benchmarks.speed`, then `python -m benchmarks.speed.report`."""
