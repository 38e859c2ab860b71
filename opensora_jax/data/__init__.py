"""Video files, the Arrow dataset and the input pipelines."""
