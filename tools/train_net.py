"""Train and test: ``python tools/train_net.py --config-file configs/magformer_embedded.yml``."""

from relreid_plugin.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
