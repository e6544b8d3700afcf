"""What `compare` costs beside the two trainings that it holds."""
