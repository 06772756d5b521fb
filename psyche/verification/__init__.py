"""What lets anyone check a contribution: traces now; audits and calibration follow (DESIGN §8)."""
