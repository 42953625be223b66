"""Graph passes for flat, functional ATen graphs. Knows nothing of caching.

Imports torch and the standard library, and triton where it is installed.
"""

from passes.canonicalize import Canonicalize as Canonicalize
from passes.choose_attention import ChooseAttention as ChooseAttention
from passes.fold_constants import FoldConstants as FoldConstants
from passes.fuse_group_norm import FuseGroupNorm as FuseGroupNorm
from passes.merge_equal import MergeEqual as MergeEqual
from passes.runner import Pass as Pass
from passes.runner import PassError as PassError
from passes.runner import PassRecord as PassRecord
from passes.runner import pass_name as pass_name
from passes.runner import run_passes as run_passes
from passes.split_over_cat import SplitOverCat as SplitOverCat
