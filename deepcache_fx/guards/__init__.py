"""What a graph bakes in beside its inputs, and how a change of that is noticed.

May import: execution and what it may.
Start reading at `model_state.ModelState`.
"""
