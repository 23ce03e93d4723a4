"""The parts of the model around the backbone, written for one device: no process groups here."""
