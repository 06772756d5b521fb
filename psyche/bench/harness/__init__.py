"""What every measurement shares: rows and tables, turns, processes, shaped links, resource usage."""
