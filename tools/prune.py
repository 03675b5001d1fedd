"""Pruned models of a GraFT run: the door to ``relreid prune``."""

from relreid_plugin.cli.prune import main

if __name__ == "__main__":
    raise SystemExit(main())
