"""What is behind a web page: settings with bounds, a line of visitors, one pipeline for all of them.

May import: everything but cli.
Start reading at `studio.Studio`, then `line.Line`.
"""
