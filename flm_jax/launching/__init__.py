"""Launching a recipe on machines that are not here: TPU VMs by gcloud, and manifests for Slurm, GKE and SkyPilot."""
