"""What passes share: predicates of nodes, rewriting, facts about operators, a minimum cut, recorded graphs, symbols.

May import: torch, the networkx and sympy that come with it, and the standard library; no pass.
Start reading at `match.is_op` and `rewrite.add_call`.
"""
