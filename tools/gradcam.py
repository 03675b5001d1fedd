"""Grad-CAM of trained runs on covered queries: the door to ``relreid gradcam``."""

from relreid_plugin.cli.looks import gradcam_main as main

if __name__ == "__main__":
    raise SystemExit(main())
