"""How a skip connection is named."""

from __future__ import annotations

from collections.abc import Sequence

from deepcache_fx.errors import BranchError
from deepcache_fx.files.reading import is_natural

Branch = int | tuple[int, int]
"""A skip connection: its number counted from the output, or the published (block, layer)."""


def check_branch(branch: object) -> Branch:
    """The name of a skip connection, as it is; a pair of numbers as a tuple.

    Raises:
        BranchError: it is no such name.
    """
    if is_natural(branch):
        return branch
    if isinstance(branch, Sequence) and len(branch) == 2 and all(map(is_natural, branch)):
        return (branch[0], branch[1])
    raise BranchError(
        f"branch must be a number of at least 0 (0 is the shallowest skip connection) or (block, layer), got {branch!r}"
    )
