"""Passes that change what a graph computes, to save time: for those who ask for them. The others are exact."""

from passes.approximate.merge_tokens import MergeTokens as MergeTokens
