"""What a run shows of itself: metrics, cost, console, pictures, Weights & Biases."""
