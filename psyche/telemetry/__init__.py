"""Telemetry: typed events in a local log, and everything that reads them. ``README.md`` is the guide to this folder."""
