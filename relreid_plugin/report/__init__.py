"""Runs and features as one HTML page that opens offline, and runs side by side as tables."""
