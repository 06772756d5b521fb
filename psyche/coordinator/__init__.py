"""What closes rounds: it leads or stands by, signs, and publishes the state of the run."""
