"""Features of images into a store: the door to ``relreid extract``."""

from relreid_plugin.cli.extract import main

if __name__ == "__main__":
    raise SystemExit(main())
