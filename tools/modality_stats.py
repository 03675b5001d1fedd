"""Mean and standard deviation of every modality: the door to ``relreid stats``."""

from relreid_plugin.cli.stats import main

if __name__ == "__main__":
    raise SystemExit(main())
