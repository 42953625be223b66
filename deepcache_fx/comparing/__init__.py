"""Pipelines loaded by name, run without and with caching, and compared: times, likeness, a picture of both.

May import: errors, files, runtime, api.
Start reading at `paired_runs.compare`.
"""
