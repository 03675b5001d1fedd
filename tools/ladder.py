"""The ablation ladder: the door to ``relreid ladder``."""

from relreid_plugin.cli.ladder import main

if __name__ == "__main__":
    raise SystemExit(main())
