"""What trains: models, engines, schedules. Everything else sees only the flat vector (DESIGN §10)."""
