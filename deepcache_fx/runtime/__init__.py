"""The step path: which step a call is, full or shallow, its caches; attached to a model, following a scheduler.

May import: guards and what it may.
Start reading at `runtime.Runtime.__call__`, then `steps.StepTracker`.
"""
