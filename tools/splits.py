"""A configuration on every split of its data set: the door to ``relreid splits``."""

from relreid_plugin.cli.splits import main

if __name__ == "__main__":
    raise SystemExit(main())
