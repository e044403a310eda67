"""What a run will need before it runs: memory of every rank, time of every stage, layouts."""
