"""The search for the schedule that is best for one model, scheduler and number of steps.

May import: api and what it may.
Start reading at `calibrate.calibrate`, then `search.Search`.
"""
