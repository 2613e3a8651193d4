"""Code that travels with exports in the internlm2 layout: transformers loads it with trust_remote_code."""
