"""Fused operators in the namespace `deepcache_fx`, and their Triton kernels. Importing this registers the operators."""

from passes.kernels.group_norm import cat_group_norm as cat_group_norm
from passes.kernels.group_norm import group_norm as group_norm
