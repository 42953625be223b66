"""Programs on disk: graphs as plain text, what they were made for, and a manifest that is checked before anything else.

May import: runtime and what stands below it.
Start reading at `store.ProgramDirectory`.
"""
