"""The ablation ladder: ``python tools/ladder.py --config-file configs/magformer_embedded.yml``."""

from relreid_plugin.magformer.ladder import main

if __name__ == "__main__":
    raise SystemExit(main())
