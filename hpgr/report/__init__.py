"""Finished work as pages that open offline: a run (`run`), a search (`search`). No torch, no Ray."""
