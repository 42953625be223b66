"""`python -m deepcache_fx.cli`: the command `deepcache-fx`, where its script is not on the path."""

from deepcache_fx.cli.app import main

main()
