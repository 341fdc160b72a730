"""Logs -> validated rows -> timelines -> sessions -> masks -> batches: pure functions, no Ray, no torch."""
