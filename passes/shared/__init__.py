"""What passes share: predicates of nodes, rewriting, facts about operators, a minimum cut.

May import: torch and the standard library; no pass.
Start reading at `match.is_op` and `rewrite.add_call`.
"""
