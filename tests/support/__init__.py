"""What tests share: models and data made on the spot, claims, and stand-ins for hardware that is not there."""
