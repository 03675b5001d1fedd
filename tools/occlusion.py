"""Trained runs while more and more of every query is covered: the door to ``relreid occlusion``."""

from relreid_plugin.cli.looks import occlusion_main as main

if __name__ == "__main__":
    raise SystemExit(main())
