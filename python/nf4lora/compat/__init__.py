"""What is built on: whether it is there, and what of other libraries is used beyond their public interface."""
