"""Train and test a configuration: the door to ``relreid train``."""

from relreid_plugin.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
