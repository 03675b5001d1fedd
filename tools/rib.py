"""RIB's table: the door to ``relreid tables rib``."""

from relreid_plugin.cli.tables import rib_main as main

if __name__ == "__main__":
    raise SystemExit(main())
