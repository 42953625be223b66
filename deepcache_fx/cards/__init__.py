"""Which values to begin with for a model: its family, told from configurations, and a table that cites. No tensors.

May import: schedules and what it may.
Start reading at `table.CARDS`, then `family.family_of` and `choose.choose`.
"""
