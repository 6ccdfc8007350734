"""What is kept of a run, and its way to MLflow. The only folder that imports mlflow."""
