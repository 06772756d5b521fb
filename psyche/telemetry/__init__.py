"""Telemetry: typed events in a local log, and everything that reads them (DESIGN §11).

:mod:`~psyche.telemetry.events` is the hub and imports nothing heavy. The monitor, W&B, the terminal views
and the report are *listeners* or *readers* of events; none of them is needed for a run to go on.
"""
