"""Feature space, attention scores and stage-2 loss of tested runs: the door to ``relreid figures``."""

from relreid_plugin.cli.figures import main

if __name__ == "__main__":
    raise SystemExit(main())
