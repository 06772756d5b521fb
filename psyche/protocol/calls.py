"""What members and coordinators agree on about calls to a coordinator: ``watch`` and ``submit``."""

WATCH_SECONDS = 4.0
"""How long a watcher's question is left open when nothing changes; well under any ``silence`` bound."""
STANDBY = "this coordinator does not lead"
UNKNOWN = "present yourself first"
"""What a watcher hears whom the coordinator does not know, or no longer: after a restart, or a long silence."""
MAX_SUBMISSION = 1 << 20
MAX_STATUS = 8 << 20
