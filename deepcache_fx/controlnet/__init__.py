"""A pipeline's ControlNet, which computes in a shallow step only the residuals that the UNet reads then.

May import: runtime and what it may.
Start reading at `controlnet_runtime.ControlNetRuntime`, then `follow.PipelineFollower`.
"""
