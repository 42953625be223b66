"""The command `deepcache-fx`, one file a command.

May import: everything; typer and rich are imported here alone.
Start reading at `app.main`.
"""
