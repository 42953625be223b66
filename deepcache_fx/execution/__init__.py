"""Variants made callable: backends, called or recorded programs, how weights lie in memory for them.

May import: graph and what it may; passes.
Start reading at `assemble.assemble`, then `programs.DirectPrograms`.
"""
