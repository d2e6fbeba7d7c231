"""`megatron-ladder submit`: a chain of commands and a cluster's profile become scripts and jobs."""
