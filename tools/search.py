"""Rank a store for query images: the door to ``relreid search``."""

from relreid_plugin.cli.search import main

if __name__ == "__main__":
    raise SystemExit(main())
