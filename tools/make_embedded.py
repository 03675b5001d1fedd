"""Write an embedded data set: the door to ``relreid data make-embedded``."""

from relreid_plugin.cli.data import make_main as main

if __name__ == "__main__":
    raise SystemExit(main())
