"""The information bottleneck bound over the training of finished runs: the door to ``relreid information``."""

from relreid_plugin.cli.looks import information_main as main

if __name__ == "__main__":
    raise SystemExit(main())
