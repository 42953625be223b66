"""A UNet call in canonical form, captured as a `torch.fx` graph, passed over and split into full and shallow.

May import: errors, options, schedules; passes.
Start reading at `capture.capture`, `skips.find_skip_connections`, `split.split`.
"""
