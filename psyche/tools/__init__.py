"""Commands that take part in no run: doctor, export, generate, evaluate."""
