"""Hyper-parameter search without Ray: what may vary, and what has been tried."""
