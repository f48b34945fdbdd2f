"""The demo: pushes of a sample application on a stand-in cluster, told as they happen."""
