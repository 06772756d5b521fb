"""What it costs in loss to train on while a round is on the wire."""
