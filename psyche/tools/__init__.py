"""Commands that join no run: doctor, costs, evaluate, generate, export."""
