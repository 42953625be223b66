"""Files that are written whole or not at all, and read with their mistakes named.

May import: errors.
Start reading at `writing.replacing`.
"""
