"""Which denoising steps run the whole UNet and which reuse the cached feature: no tensors, no torch.

May import: errors, files; numpy.
Start reading at `schedule.Schedule`, then `patterns.Uniform`.
"""
