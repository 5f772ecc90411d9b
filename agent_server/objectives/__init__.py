"""What each task asks of a model: a loss to descend and metrics to report. `base` tells what an objective is."""
