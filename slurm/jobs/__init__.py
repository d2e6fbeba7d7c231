"""What is known of a job: its folder, what SLURM says of it, and jobs that run without SLURM."""
