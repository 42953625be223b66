"""What caching is worth for a model before it runs: costs by branch, published configurations, example inputs.

May import: api and what it may.
Start reading at `plan.plan`.
"""
