"""A UNet as a picture: every level, skip connection and layer, and at which rate it runs.

May import: planning and what it may.
Start reading at `draw.draw`, then `dissect.dissect`.
"""
