"""hpgr: train, tune and run HPGR (arXiv 2603.00980) on a Ray cluster."""

__version__ = "0.1.0"
