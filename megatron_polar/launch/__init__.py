"""What comes before a training job on a cluster: looking at its nodes before a GPU hour is spent."""
