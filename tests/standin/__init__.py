"""A stand-in Kubernetes cluster for tests and demonstrations.

It is a test double: in memory, Linux only, spoken to by the real kubectl over TLS on loopback.
It answers as recordings of a real cluster do; the product never imports it.
"""
