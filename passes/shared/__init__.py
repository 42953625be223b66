"""What passes share: predicates of nodes, rewriting, facts about operators, a minimum cut, recorded CUDA graphs.

May import: torch, the networkx that comes with it, and the standard library; no pass.
Start reading at `match.is_op` and `rewrite.add_call`.
"""
