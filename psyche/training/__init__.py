"""Models, engines and schedules. The rest of psyche sees only the flat parameter vector."""
