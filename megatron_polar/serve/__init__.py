"""Rewards over HTTP: a server of our own, and a client for it and for the engines that serve exports."""
