"""``python -m relreid_plugin`` is ``relreid``."""

from .cli.main import main

raise SystemExit(main())
