"""The coordinator: leads or stands by, closes rounds, signs, and publishes the run status (README.md)."""
