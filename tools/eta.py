"""Sweep of eta, the weight of the information bottleneck bound: the door to ``relreid sweep``."""

from relreid_plugin.cli.tables import sweep_main as main

if __name__ == "__main__":
    raise SystemExit(main())
