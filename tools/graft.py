"""GraFT's ablations: the door to ``relreid tables graft``."""

from relreid_plugin.cli.tables import graft_main as main

if __name__ == "__main__":
    raise SystemExit(main())
