"""The command `deepcache-fx`, one file a command, and the comparison of cached and uncached images behind one.

May import: everything; typer and rich are imported here alone.
Start reading at `app.main`.
"""
