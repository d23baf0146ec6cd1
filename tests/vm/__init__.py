"""The lab: tests in a virtual machine with the distribution's own kernel."""
