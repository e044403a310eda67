"""The algorithm: ratios, advantages, objectives, statistics, dual variable. Pure torch."""
